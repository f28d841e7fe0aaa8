"""How fast a graph is loaded and analysed, beside Torch-Pruning, and how that grows with the graph.

Architectures (default): for each one the median of `load` (open, check, infer shapes, fold) and of `analyse` (axes,
groups, dead values, coverage: on a loaded graph, afresh each time), against Torch-Pruning's dependency graph and the
enumeration of all its groups for the same torchvision model. The rival runs in a Python of its own, as a child with a
limit on time and memory, between two halves of our runs; a repeat that did not end within them is reported as such.

    python tools/bench_analysis.py --rival-python VENV/bin/python --work DIR --export
    python tools/bench_analysis.py --work DIR                            ours only, on models exported before

VENV holds torch, torchvision, torch-pruning, onnx and onnxscript. `--export` writes untrained 224x224 models to DIR.

    python tools/bench_analysis.py --work DIR --growth     time per node, 100 to 30,000 nodes: must stay level
    python tools/bench_analysis.py --work DIR --large      Swin-T exported without constant folding; a Llama-7B graph

Wall times; where the machine has other work, the minimum tells more than the median.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from _common import machine_note, milliseconds, print_table, repeat, verdict, write_json
from _graphs import conv_chain, decoder, encoder_stack
from onnx import ModelProto

from onnxprune.axes.analysis import Analysis, analyse
from onnxprune.model.load import load

ARCHITECTURES = (
    "resnet50",
    "densenet201",
    "swin_t",
    "mobilenet_v2",
    "efficientnet_b0",
    "vit_b_16",
    "shufflenet_v2_x1_0",
)
ANALYSE_TARGETS = {"resnet50": 0.020, "densenet201": 0.150, "swin_t": 0.150}
NODE_COUNTS = (100, 300, 1000, 3000, 10_000, 30_000)
LEVEL = 1.5  # time per node of the largest graph, against that at LEVEL_FROM nodes
LEVEL_FROM = 1000
RAW_LOAD_TARGET, LLAMA_TARGET = 5.0, 2.0
OUT_OF_MEMORY = ("MemoryError", "bad_alloc", "allocate memory")
RIVAL = Path(__file__).with_name("_rival_torch_pruning.py")
LLAMA = {"layers": 32, "hidden": 4096, "heads": 32, "mlp": 11008, "vocabulary": 32000}


@dataclass
class Ours:
    """Seconds of every run of ours on one model."""

    nodes: int = 0
    groups: int = 0
    coverage: float = 0.0
    load_s: list[float] = field(default_factory=list)
    analyse_s: list[float] = field(default_factory=list)


@dataclass
class Rival:
    """Seconds of every repeat of Torch-Pruning on one model; `note` says why there are fewer than asked for."""

    build_s: list[float] = field(default_factory=list)
    groups_s: list[float] = field(default_factory=list)
    groups: int = 0
    peak_mb: float = 0.0
    version: str = ""
    note: str = ""

    @property
    def total_s(self) -> list[float]:
        return [a + b for a, b in zip(self.build_s, self.groups_s, strict=True)]


def measure(path: Path, runs: int, into: Ours | None = None) -> Ours:
    """Load and analyse `runs` times each."""
    found = into or Ours()
    found.load_s += repeat(lambda: load(path), runs)
    graph = load(path)
    last: list[Analysis] = []
    gc.collect()

    def once() -> None:
        last[:] = [analyse(graph)]

    found.analyse_s += repeat(once, runs)
    found.nodes, found.groups, found.coverage = len(graph.nodes), len(last[0].groups), last[0].coverage.fraction
    return found


def run_rival(python: str, model: str, repeats: int, limit: float, memory: float) -> Rival:
    """Torch-Pruning in a child process of at most `memory` GB; what it said before it was stopped counts."""
    command = [python, str(RIVAL), "time", "--model", model, "--repeats", str(repeats), "--memory", str(memory)]
    note, start = "", time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
        said = done.stdout
        if done.returncode:
            exhausted = any(sign in done.stderr for sign in OUT_OF_MEMORY)
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            why = f"needs more than {memory:g} GB" if exhausted else f"failed ({done.returncode}): {last[:100]}"
            note = f"{why}, after {time.perf_counter() - start:.0f} s"
    except subprocess.TimeoutExpired as expired:
        said = expired.stdout.decode() if isinstance(expired.stdout, bytes) else expired.stdout or ""
        note = f"did not end in {limit:.0f} s"
    found = Rival(note=note)
    for line in said.splitlines():
        if not line.startswith("{"):
            continue
        row = json.loads(line)
        if "build_s" in row:
            found.build_s.append(row["build_s"])
            found.groups_s.append(row["groups_s"])
            found.groups, found.peak_mb = row["groups"], row["peak_mb"]
        else:
            found.version = f"torch-pruning {row['version']}, torch {row['torch']}"
    if note and found.build_s:
        found.note = f"{note}, {len(found.build_s)} of {repeats} repeats done"
    return found


def architectures(options: argparse.Namespace) -> dict[str, Any]:
    if options.export:
        if not options.rival_python:
            sys.exit("--export needs --rival-python: the models are exported there")
        subprocess.run(
            [options.rival_python, str(RIVAL), "export", "--out", str(options.work), "--models", *options.models],
            check=True,
        )
    rows, document = [], {}
    for name in options.models:
        path = options.work / f"{name}.onnx"
        if not path.exists():
            sys.exit(f"{path.name} is not in {options.work}: --export makes it")
        ours = measure(path, -(-options.runs // 2))
        rival = None
        if options.rival_python:
            rival = run_rival(options.rival_python, name, options.repeats, options.limit, options.memory)
        measure(path, options.runs // 2 or 1, ours)
        document[name] = {"ours": asdict(ours), "rival": asdict(rival) if rival else None}
        rows.append(architecture_row(name, ours, rival))
        print(f"{name} done", file=sys.stderr, flush=True)
    version = next((d["rival"]["version"] for d in document.values() if d["rival"]), "not measured")
    print_table(
        [
            "model",
            "nodes",
            "groups",
            "coverage",
            "load ms",
            "analyse ms",
            "(min)",
            "target",
            "",
            "rival ms",
            "build",
            "groups",
            "n",
            "peak MB",
            "ratio",
            "note",
        ],
        rows,
        f"Analysis; rival: {version}. ratio: rival's total over analyse; with load: over load + analyse",
    )
    return document


def architecture_row(name: str, ours: Ours, rival: Rival | None) -> list[str]:
    analysed = statistics.median(ours.analyse_s)
    limit = ANALYSE_TARGETS.get(name)
    row = [
        name,
        str(ours.nodes),
        str(ours.groups),
        f"{ours.coverage:.1%}",
        milliseconds(statistics.median(ours.load_s)),
        milliseconds(analysed),
        milliseconds(min(ours.analyse_s)),
        f"<= {limit * 1e3:.0f}" if limit else "",
        verdict(analysed, limit) if limit else "",
    ]
    if rival is None:
        return [*row, "", "", "", "", "", "", "not asked for"]
    if not rival.total_s:
        at_least = f"> {options_limit(rival)}" if rival.note.startswith("did not") else ""
        return [*row, at_least, "", "", "", "", "", rival.note]
    total = statistics.median(rival.total_s)
    loaded = analysed + statistics.median(ours.load_s)
    return [
        *row,
        milliseconds(total),
        milliseconds(statistics.median(rival.build_s)),
        milliseconds(statistics.median(rival.groups_s)),
        str(rival.groups),
        f"{rival.peak_mb:.0f}",
        f"{total / analysed:.0f}x ({total / loaded:.0f}x with load)",
        rival.note,
    ]


def options_limit(rival: Rival) -> str:
    """The limit in a note of `run_rival`, in milliseconds."""
    return f"{float(rival.note.split()[4]) * 1e3:.0f}"


def growth(options: argparse.Namespace) -> dict[str, Any]:
    """Time per node must not depend on how many there are."""
    document: dict[str, Any] = {}
    kinds: Sequence[tuple[str, Callable[[int], ModelProto]]] = (
        ("residual convolutions", conv_chain),
        ("transformer layers", encoder_stack),
    )
    for title, build in kinds:
        rows, per_node = [], {}
        for count in options.nodes:
            model = build(count)
            runs = max(options.runs if count <= 1000 else options.runs // 3, 3)
            loading = repeat(lambda model=model: load(model), 3)  # type: ignore[misc]
            graph = load(model)
            gc.collect()
            nodes = len(graph.nodes)
            try:
                taken = repeat(lambda graph=graph: analyse(graph), runs)  # type: ignore[misc]
            except (RecursionError, MemoryError) as error:
                rows.append([str(nodes), "", milliseconds(statistics.median(loading)), type(error).__name__, *[""] * 3])
                continue
            middle = statistics.median(taken)
            per_node[count] = middle / nodes
            rows.append(
                [
                    str(nodes),
                    str(len(analyse(graph).groups)),
                    milliseconds(statistics.median(loading)),
                    milliseconds(middle),
                    milliseconds(min(taken)),
                    f"{middle / nodes * 1e6:.1f}",
                    f"{min(taken) / nodes * 1e6:.1f}",
                ]
            )
            document.setdefault(title, []).append({"nodes": nodes, "analyse_s": taken, "load_s": loading})
        print_table(["nodes", "groups", "load ms", "analyse ms", "(min)", "us/node", "(min)"], rows, f"Growth: {title}")
        if LEVEL_FROM in per_node and options.nodes[-1] in per_node and options.nodes[-1] > LEVEL_FROM:
            ratio = per_node[options.nodes[-1]] / per_node[LEVEL_FROM]
            print(
                f"time per node at {options.nodes[-1]} nodes is {ratio:.2f} of that at {LEVEL_FROM}: "
                f"{'linear' if ratio <= LEVEL else 'NOT linear'} (up to {LEVEL} counts as linear)"
            )
            document[f"{title}: ratio"] = ratio
    return document


def large(options: argparse.Namespace) -> dict[str, Any]:
    """A raw export that is mostly shape arithmetic, and a graph whose weights would not fit in memory."""
    raw = options.work / "swin_t.raw.onnx"
    if not raw.exists() and options.rival_python:
        subprocess.run(
            [options.rival_python, str(RIVAL), "export", "--out", str(options.work), "--models", "swin_t", "--raw"],
            check=True,
        )
    document: dict[str, Any] = {}
    rows: list[list[str]] = []
    if raw.exists():
        ours = measure(raw, options.runs // 3 or 1)
        loaded = statistics.median(ours.load_s)
        slim = run_slim(raw, options.limit)
        rows += [
            [
                f"swin_t raw, {ours.nodes} nodes",
                "load and fold",
                f"{loaded:.2f}",
                f"{min(ours.load_s):.2f}",
                f"<= {RAW_LOAD_TARGET:.0f}",
                verdict(loaded, RAW_LOAD_TARGET),
            ],
            ["", "analyse", f"{statistics.median(ours.analyse_s):.2f}", f"{min(ours.analyse_s):.2f}", "", ""],
            [
                "",
                "onnxslim",
                *(
                    [
                        f"{statistics.median(slim):.2f}",
                        f"{min(slim):.2f}",
                        "",
                        f"{statistics.median(slim) / loaded:.1f}x of load",
                    ]
                    if isinstance(slim, list)
                    else ["", "", "", slim]
                ),
            ],
        ]
        document["swin_t raw"] = {"ours": asdict(ours), "onnxslim_s": slim}
    else:
        print("swin_t.raw.onnx is not in the work folder, and there is no --rival-python to export it with")
    path = options.work / "llama_7b_shape.onnx"
    total = decoder(path, hollow=True, **LLAMA)
    ours = measure(path, options.runs // 3 or 1)
    analysed = statistics.median(ours.analyse_s)
    rows += [
        [
            f"Llama-7B shape, {ours.nodes} nodes",
            "load",
            f"{statistics.median(ours.load_s):.2f}",
            f"{min(ours.load_s):.2f}",
            "",
            "",
        ],
        [
            f"{total / 1e9:.1f} GB (sparse file)",
            "analyse",
            f"{analysed:.2f}",
            f"{min(ours.analyse_s):.2f}",
            f"<= {LLAMA_TARGET:.0f}",
            verdict(analysed, LLAMA_TARGET),
        ],
    ]
    document["llama"] = asdict(ours)
    print_table(["model", "stage", "median s", "(min)", "target", ""], rows, "Large graphs")
    return document


def run_slim(path: Path, limit: float, runs: int = 3) -> list[float] | str:
    """Seconds that onnxslim takes to load and simplify the model, in a child of this Python; or why not."""
    script = (
        "import sys, time, json\nfrom onnxslim import slim\n"
        f"for _ in range({runs}):\n"
        "    start = time.perf_counter(); slim(sys.argv[1]); print(json.dumps(time.perf_counter() - start))\n"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        return f"did not end in {limit:.0f} s"
    if done.returncode:
        return f"failed: {(done.stderr.strip().splitlines() or ['no message'])[-1][:80]}"
    return [float(line) for line in done.stdout.splitlines() if line[:1].isdigit()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the exported models")
    parser.add_argument("--rival-python", help="Python that has torch, torchvision and torch-pruning")
    parser.add_argument("--export", action="store_true", help="export the models first")
    parser.add_argument("--models", nargs="+", default=list(ARCHITECTURES), help="torchvision names")
    parser.add_argument("--runs", type=int, default=10, help="runs of ours per model")
    parser.add_argument("--repeats", type=int, default=3, help="repeats of the rival per model")
    parser.add_argument("--limit", type=float, default=300, help="seconds that a rival may take per model")
    parser.add_argument("--memory", type=float, default=10, help="gigabytes that a rival may take")
    parser.add_argument("--growth", action="store_true", help="only the growth table")
    parser.add_argument("--nodes", type=int, nargs="+", default=list(NODE_COUNTS), help="sizes of the growth table")
    parser.add_argument("--large", action="store_true", help="only the large graphs")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    note = machine_note()
    print(note)
    document: dict[str, Any] = {"machine": note}
    if options.growth:
        document["growth"] = growth(options)
    if options.large:
        document["large"] = large(options)
    if not options.growth and not options.large:
        document["architectures"] = architectures(options)
    write_json(options.json, document)


if __name__ == "__main__":
    main()
