"""The terminal's text: the promised look, and no table that outgrows its limits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from onnxprune.axes.analysis import BarrierCost, Coverage, Group, Member, analyse
from onnxprune.axes.expr import Atom, Barrier
from onnxprune.model.load import load
from onnxprune.report import terminal
from onnxprune.report.text import percent
from onnxprune.result import (
    Accuracy,
    Latency,
    LatencyStats,
    ModelSummary,
    Result,
    TargetOutcome,
    Training,
    Verification,
)
from onnxprune.select.plan import Plan
from onnxprune.verify.latency import Bench

BEFORE = ModelSummary(
    "resnet18.onnx",
    11_680_000,
    1_810_000_000,
    46_760_000,
    17,
    8,
    "pytorch 2.9",
    (("input", "float32", "(N,3,224,224)"),),
    (("logits", "float32", "(N,1000)"),),
)
AFTER = replace(BEFORE, name="resnet18.pruned.onnx", params=5_840_000, macs=905_000_000, bytes=23_380_000)
SLOW = LatencyStats(20.0, 21.0, 24.0, 100, 20)
FAST = LatencyStats(10.0, 10.5, 12.0, 100, 20)
PASSED = Verification(True, 1e-5, 2.1e-6, 1e-4, 3)


def group(
    k: int, *, size: int = 64, kind: str = "exact", reason: str = "", params: int = 1000, name: str = ""
) -> Group:
    members = (
        Member(name or f"conv{k}.weight", (k, 1), 0, "produces"),
        Member(f"conv{k + 1}.weight", (k + 1, 1), 1, "consumes"),
    )
    return Group(f"g{k}", Atom(size), kind, reason, members, params)


def analysis(*groups: Group, barriers: tuple[BarrierCost, ...] = (), coverage: Coverage | None = None) -> Any:
    return SimpleNamespace(groups=groups, barriers=barriers, coverage=coverage or Coverage(1000, 900, 900))


def result(**changes: Any) -> Result:
    found = analysis(group(0), group(1), group(2, kind="inexact", reason="LayerNormalization over it"))
    plan = Plan({"g0": np.arange(32), "g1": np.arange(48)})
    settings: dict[str, Any] = {
        "before": BEFORE,
        "after": AFTER,
        "target": TargetOutcome("macs", "macs=0.5", 0.5, 0.5, True),
        "plan": plan,
        "analysis": found,
        "verification": PASSED,
        "latency": Latency(SLOW, FAST, True, 1, "all"),
        "output": "out/resnet18.pruned.onnx",
        "align": 16,
        "aligned": (20, 20, 19, 20),
    }
    return Result(**{**settings, **changes})


def widths(table: str) -> set[int]:
    return {len(line) for line in table.splitlines() if line[:1] in "+|"}


def test_the_summary_looks_as_promised() -> None:
    assert (
        terminal.summary_table(result())
        == """\
+-------------------+--------------------------+--------------------------+---------+
|                   | resnet18.onnx            | resnet18.pruned.onnx     | change  |
+-------------------+--------------------------+--------------------------+---------+
| Opset / IR        | 17 / 8                   | 17 / 8                   | same    |
| IN  input         | float32 (N,3,224,224)    | float32 (N,3,224,224)    | same    |
| OUT logits        | float32 (N,1000)         | float32 (N,1000)         | same    |
| Params / size     | 11.68 M / 46.8 MB        | 5.84 M / 23.4 MB         | −50.0 % |
| MACs (batch 1)    | 1.81 G                   | 905.0 M                  | −50.0 % |
| Latency, 1 thread | 20.00 / 21.00 / 24.00 ms | 10.00 / 10.50 / 12.00 ms | 2.00×   |
| Aligned channels  | 20/20 (block 16)         | 19/20                    |         |
| Groups pruned     | –                        | 2 of 3 (1: inexact)      |         |
+-------------------+--------------------------+--------------------------+---------+"""
    )


def test_the_metric_has_a_row_after_each_step() -> None:
    accuracy = Accuracy("top1", True, 0.8690, 0.3120, 0.8512, 0.0178, True, repaired=0.7010)
    table = terminal.summary_table(result(accuracy=accuracy))
    rows = [line.split("|")[1:5] for line in table.splitlines() if "top1" in line or "  after re" in line]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["Accuracy", "top1 86.90%", "85.12%", "−1.8 pp"],
        ["after removal", "", "31.20%", ""],
        ["after repair", "", "70.10%", ""],
    ]
    assert "after repair" not in terminal.summary_table(result(accuracy=replace(accuracy, repaired=None)))


def test_training_is_told_with_its_data_and_its_proof() -> None:
    training = Training("auto", "calib.npz (512 samples)", 500, 4, 61.5, 2.5, 0.25, 800.0, 0, 120, 15, 1e-7, 2.1e-6)
    report = terminal.compress_report(result(training=training))
    assert (
        "trained: 500 steps in 62 s on calib.npz (512 samples), loss 'auto' 2.5 to 0.25, continued at step 120, "
        "15 BatchNorms put in and folded again\n"
        "        the trained network equals the file in onnxruntime: relative error 2.1e-6"
    ) in report


def test_the_verify_line_looks_as_promised() -> None:
    assert terminal.verify_line(PASSED) == (
        "verify: passed (onnxruntime, 3 input sets, max relative error 2.1e-6 against the masked original)"
    )


def test_a_failed_verification_is_loud_and_names_the_tolerance() -> None:
    line = terminal.verify_line(replace(PASSED, passed=False, max_rel_error=0.25, notes=("output 'logits'",)))
    assert "FAILED" in line
    assert "2.5e-1" in line
    assert "tolerance 1.0e-4" in line
    assert "output 'logits'" in line


def test_the_report_gives_kept_and_removed() -> None:
    target = TargetOutcome("macs", "macs=0.4", 0.4, 0.4375, False)
    report = terminal.compress_report(result(target=target))
    assert "target: macs=0.4 NOT met, 43.8 % kept, 56.2 % removed (asked for 40.0 % kept)" in report
    assert "written: out/resnet18.pruned.onnx" in report


def test_a_latency_within_the_noise_is_no_change() -> None:
    report = terminal.compress_report(result(latency=Latency(SLOW, replace(SLOW, median_ms=20.5), False, 2, "all")))
    row = next(line for line in report.splitlines() if "Latency, 2 threads" in line)
    assert "no change" in row
    assert "1.02×, not significant" in report


def test_a_dry_run_shows_the_plan_and_claims_no_more() -> None:
    report = terminal.compress_report(
        result(after=None, verification=None, latency=None, output=None, aligned=(0,) * 4)
    )
    assert "planned" in report
    assert "about 905.0 M" in report
    assert "nothing was written" in report
    assert "verify" not in report
    params = next(line for line in report.splitlines() if "Params" in line)
    assert params.split("|")[3].strip() == "–"


def test_verbose_adds_every_group_and_the_stages() -> None:
    report = terminal.compress_report(result(timing={"load_s": 0.5, "verify_s": 1.25}), verbose=True)
    assert "time: load 0.50 s, verify 1.25 s" in report
    rows = {line.split("|")[1].strip(): line for line in report.splitlines() if line.startswith("| g")}
    assert [cell.strip() for cell in rows["g1"].split("|")[2:5]] == ["64", "48", "−25.0 %"]
    assert "same" in rows["g2"]


def test_a_changed_input_is_seen() -> None:
    after = replace(AFTER, inputs=(("input", "float32", "(1,3,224,224)"),), opset=18)
    rows = terminal.summary_table(result(after=after)).splitlines()
    assert next(line for line in rows if "IN  input" in line).rstrip(" |").endswith("changed")
    assert next(line for line in rows if "Opset" in line).rstrip(" |").endswith("changed")


def test_long_names_and_shapes_do_not_widen_the_table() -> None:
    long = "past_key_values." * 8
    wide = replace(BEFORE, name=long + ".onnx", inputs=((long, "float32", f"({long},{long})"),))
    table = terminal.summary_table(result(before=wide, after=replace(wide, name=long)))
    assert len(widths(table)) == 1
    assert max(widths(table)) <= 103
    assert "…" in table


def test_many_inputs_are_capped_unless_asked_for() -> None:
    many = replace(BEFORE, inputs=tuple((f"past.{k}", "float32", "(N,4)") for k in range(60)))
    short = terminal.summary_table(result(before=many, after=many))
    assert "and 52 more" in short
    assert "past.59" in terminal.summary_table(result(before=many, after=many), verbose=True)


def test_names_cannot_break_the_layout() -> None:
    odd = replace(BEFORE, inputs=(("a\nb\x1b[31m", "float32", "(1)"),))
    table = terminal.summary_table(result(before=odd, after=odd))
    assert "\x1b" not in table
    assert len(widths(table)) == 1


def test_inspect_lists_barriers_by_parameters_lost_with_node_and_reason() -> None:
    barriers = (
        BarrierCost(Barrier("decoder/Foo", "Foo", "Foo is not understood"), 90),
        BarrierCost(Barrier("", "output", "graph output 'logits'"), 10),
    )
    text = terminal.inspect_report(BEFORE, analysis(group(0), barriers=barriers))
    assert "not prunable: 100 parameters" in text
    assert text.index("Foo is not understood") < text.index("graph output 'logits'")
    row = next(line for line in text.splitlines() if "decoder/Foo" in line)
    assert [cell.strip() for cell in row.split("|")[1:4]] == ["90", "9.0 %", "Foo"]


def test_inspect_says_how_much_is_prunable_exactly_where_that_differs() -> None:
    text = terminal.inspect_report(BEFORE, analysis(group(0), coverage=Coverage(1000, 900, 750)))
    assert "prunable: 90.0 % of the parameters, 75.0 % exactly, in 1 group" in text
    assert "exactly" not in terminal.inspect_report(BEFORE, analysis(group(0)))


def test_inspect_gives_the_reason_of_an_inexact_group() -> None:
    text = terminal.inspect_report(BEFORE, analysis(group(0, kind="inexact", reason="Softmax over it")))
    assert "inexact" in text
    assert "Softmax over it" in text


def test_groups_that_share_a_reason_share_its_line() -> None:
    reason = "LayerNormalization over it, " * 10
    text = terminal.inspect_report(BEFORE, analysis(*(group(k, kind="inexact", reason=reason) for k in range(8))))
    assert f"g0, g1, g2, g3, g4, g5 and 2 more: {reason}" in text
    assert max(widths(text)) <= 120


def test_groups_are_capped_largest_first_unless_asked_for() -> None:
    found = analysis(*(group(k, params=k) for k in range(300)))
    short = terminal.inspect_report(BEFORE, found)
    assert "… and 280 more groups; -v lists all" in short
    assert "g299 " in short
    assert "g100 " not in short
    assert "g100 " in terminal.inspect_report(BEFORE, found, verbose=True)


def test_inspect_of_a_real_model_keeps_within_its_widths(tiny_cnn: Path) -> None:
    text = terminal.inspect_report(BEFORE, analyse(load(tiny_cnn)))
    assert "in 2 groups" in text
    assert max(map(len, text.splitlines())) <= 120


def test_a_model_without_groups_has_no_empty_table() -> None:
    text = terminal.inspect_report(BEFORE, analysis(coverage=Coverage(0, 0, 0)))
    assert "in 0 groups" in text
    assert "|" not in text


BENCH = Bench((SLOW, FAST, replace(SLOW, nchwc_kernels=-1)), (False, True, False), 2, "extended", "onnxruntime 1.2 CPU")


def test_bench_compares_with_the_first_and_states_the_conditions() -> None:
    text = terminal.bench_table(["x/a.onnx", "x/b.onnx", "x/c.onnx"], BENCH)
    a, b, c = (line for line in text.splitlines() if ".onnx" in line)
    assert a.rstrip(" |").endswith("–")
    assert "2.00×" in b
    assert "not significant" not in b
    assert "1.00×, not significant" in c
    assert "onnxruntime 1.2 CPU, 2 threads, graph optimisation 'extended', in turns" in text


def test_bench_shows_kernel_counts_and_a_question_mark_where_unknown() -> None:
    rows = [line for line in terminal.bench_table(["a", "b", "c"], BENCH).splitlines() if line.startswith("| ")]
    assert [row.split("|")[6].strip() for row in rows] == ["NCHWc", "20", "20", "?"]


def test_models_of_the_same_file_name_are_told_apart() -> None:
    text = terminal.bench_table(["old/m.onnx", "new/m.onnx", "c.onnx"], BENCH)
    assert "old/m.onnx" in text
    assert "new/m.onnx" in text


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00 k"),
        (11_680_000, "11.68 M"),
        (99_999, "100.0 k"),
        (999_999, "1.00 M"),
        (1_810_000_000, "1.81 G"),
        (5_120_000_000_000, "5.12 T"),
    ],
)
def test_counts(n: int, text: str) -> None:
    assert terminal.count_text(n) == text


@pytest.mark.parametrize(("n", "text"), [(12, "12 B"), (5_000_000, "5.0 MB"), (46_760_000, "46.8 MB"), (2e9, "2.0 GB")])
def test_sizes_are_counted_as_targets_are(n: float, text: str) -> None:
    assert terminal.bytes_text(n) == text


@pytest.mark.parametrize(
    ("fraction", "text"),
    [(0.0, "0.0 %"), (1.0, "100.0 %"), (0.4999, "50.0 %"), (0.99999, "99.9 %"), (0.00001, "<0.1 %")],
)
def test_a_share_is_never_rounded_to_all_or_nothing(fraction: float, text: str) -> None:
    assert percent(fraction) == text


def test_an_ascii_terminal_gets_the_same_layout() -> None:
    table = terminal.summary_table(result())
    plain = terminal.ascii_only(table)
    assert plain.isascii()
    assert widths(plain) == widths(table)
    assert "-50.0 %" in plain
    assert "2.00x" in plain
