"""JSON documents: each validates against the shipped schema, which leaves no field undescribed."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest

from onnxprune import pipeline
from onnxprune.axes.analysis import Group, Member
from onnxprune.axes.expr import Atom
from onnxprune.report import document
from onnxprune.result import Accuracy, Latency, LatencyStats, Result, Training, Verification
from onnxprune.verify.latency import Bench

STATS = LatencyStats(1.0, 2.0, 3.0, 10, 4)


def shipped_schema() -> Any:
    return json.loads(files("onnxprune.report").joinpath("schema-1.json").read_text(encoding="utf-8"))


def closed(schema: Any) -> Any:
    """The schema with no room for fields that it doesn't describe."""
    if isinstance(schema, dict):
        found = {key: closed(value) for key, value in schema.items()}
        if "properties" in found:
            found["additionalProperties"] = False
        return found
    return [closed(item) for item in schema] if isinstance(schema, list) else schema


def valid(text: str) -> Any:
    """The document, validated."""
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    jsonschema.Draft202012Validator(closed(shipped_schema())).validate(found)
    return found


@pytest.fixture(scope="module")
def compressed(tiny_cnn_model: onnx.ModelProto, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return pipeline.compress(tiny_cnn_model, tmp_path_factory.mktemp("document") / "small.onnx", target="macs=0.5")


def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(shipped_schema())


def test_every_definition_is_used() -> None:
    schema = shipped_schema()
    text = json.dumps(schema)
    assert [name for name in schema["$defs"] if f'"#/$defs/{name}"' not in text] == []


def test_inspect(tiny_cnn: Path) -> None:
    found = pipeline.inspect(tiny_cnn)
    read = valid(
        document.to_json(
            document.inspect_document(
                found.summary, found.analysis, timing={"load_s": found.load_s, "analyse_s": found.analyse_s}
            )
        )
    )
    assert (read["schema"], read["command"]) == (1, "inspect")
    assert [g["size"] for g in read["groups"]] == [64, 64]
    assert read["coverage"]["params_total"] == read["model"]["params"]
    assert read["model"]["inputs"] == [{"name": "image", "type": "float32", "shape": "(N,3,16,16)"}]
    assert sum(b["params"] for b in read["barriers"]) == (
        read["coverage"]["params_total"] - read["coverage"]["params_prunable"]
    )


def test_members_say_what_they_do_and_whether_they_are_zero(tiny_cnn: Path) -> None:
    found = pipeline.inspect(tiny_cnn)
    first = document.inspect_document(found.summary, found.analysis, timing={})["groups"][0]
    roles = {m["initializer"]: (m["role"], m["zeroed"]) for m in first["members"]}
    assert roles["conv1.weight"] == ("produces", True)
    assert roles["bn.gamma"] == ("produces", True)
    assert roles["bn.var"] == ("produces", False)  # it follows the unit; a variance of zero would divide by zero
    assert roles["conv2.weight"] == ("consumes", False)


def test_the_internal_role_does_not_leak() -> None:
    written = document._group(Group("g0", Atom(4), "exact", "", (Member("scale", (0, 1), 0, "follows"),), 4))
    assert written["members"] == [{"initializer": "scale", "axis": 0, "role": "produces", "zeroed": False}]


def test_compress(compressed: Result) -> None:
    read = valid(document.to_json(document.compress_document(compressed)))
    assert read["target"]["met"]
    assert read["after"]["macs"] < read["before"]["macs"]
    assert read["verification"]["passed"]
    assert read["latency"] is None
    assert all(0 < row["kept"] <= row["size"] for row in read["plan"])
    assert any(row["kept"] < row["size"] for row in read["plan"])


def test_the_plan_lists_untouched_groups_too(compressed: Result) -> None:
    whole = copy.copy(compressed)
    whole.plan = type(compressed.plan)({})
    assert [(row["size"], row["kept"]) for row in document.compress_document(whole)["plan"]] == [(64, 64), (64, 64)]


def test_a_dry_run_has_nulls(compressed: Result) -> None:
    dry = copy.copy(compressed)
    dry.after = dry.verification = dry.latency = dry.output = None
    read = valid(document.to_json(document.compress_document(dry)))
    assert (read["after"], read["verification"], read["latency"], read["output"]) == (None,) * 4


def test_training_and_a_metric_are_told(compressed: Result) -> None:
    training = Training("auto", "calib.npz", 500, 4, 61.5, 2.5, math.nan, 800.0, 0, None, 15, 1e-7, 2e-6)
    accuracy = Accuracy("top1", True, 0.9, None, 0.85, 0.05, True)
    read = valid(
        document.to_json(document.compress_document(replace(compressed, training=training, accuracy=accuracy)))
    )
    assert (read["training"]["steps"], read["training"]["last_loss"], read["training"]["resumed_from"]) == (
        500,
        None,
        None,
    )
    assert (read["accuracy"]["before"], read["accuracy"]["pruned"], read["accuracy"]["drop"]) == (0.9, None, 0.05)


def test_latency_is_given_at_the_median(compressed: Result) -> None:
    timed = copy.copy(compressed)
    timed.latency = Latency(STATS, LatencyStats(0.5, 1.0, 1.5, 10, -1), True, 1, "all")
    read = valid(document.to_json(document.compress_document(timed)))["latency"]
    assert (read["before_ms"], read["after_ms"], read["significant"], read["speedup"]) == (2.0, 1.0, True, 2.0)
    assert read["after"]["nchwc_kernels"] is None


def test_verify_writes_infinite_errors_as_null() -> None:
    failed = Verification(False, float("inf"), float("nan"), 1e-4, 3, ({"x": (1, 2)},), ("shapes differ",))
    read = valid(document.to_json(document.verify_document("a.onnx", "b.onnx", failed)))
    assert read["verification"]["max_abs_error"] is None
    assert read["verification"]["max_rel_error"] is None
    assert read["verification"]["shapes"] == [{"x": [1, 2]}]


def test_bench() -> None:
    bench = Bench((STATS, STATS), (False, False), 1, "all", "onnxruntime 1.2 CPU")
    read = valid(document.to_json(document.bench_document(["a.onnx", "b.onnx"], bench)))
    assert [m["against_first"] for m in read["models"]] == [None, {"speedup": 1.0, "significant": False}]


def test_numbers_of_numpy_are_numbers() -> None:
    assert json.loads(document.to_json({"a": np.int64(3), "b": np.float32(0.5), "c": [np.bool_(True)]})) == {
        "a": 3,
        "b": 0.5,
        "c": [True],
    }


def test_names_outside_ascii_stay_readable() -> None:
    assert "größe" in document.to_json({"name": "größe"})


def test_sensitivity() -> None:
    from onnxprune.sensitivity import Curve, Sensitivity

    curves = {"g0": Curve((0, 2, 4), (0.0, 0.5, float("inf")), (1.0, 0.9, 0.1))}
    found = Sensitivity(
        "digest", "obs", "agreement", True, 1.0, 64, 2.5, curves, {"g0": np.array([0.1, 0.2, 0.3, 0.4])}
    )
    read = valid(document.to_json(found.document()))
    assert read["groups"] == [
        {
            "id": "g0",
            "removed": [0, 2, 4],
            "loss": [0, 0.5, None],
            "metric": [1, 0.9, 0.1],
            "scores": [0.1, 0.2, 0.3, 0.4],
        }
    ]
