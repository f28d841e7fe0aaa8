"""What a target says, and what it refuses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxprune.errors import UsageError
from onnxprune.select.target import METRICS, parse_target


@pytest.mark.parametrize(
    ("text", "metric", "goal"),
    [
        ("macs=0.5", "macs", 500.0),
        ("params=40%", "params", 400.0),
        ("channels=25%", "channels", 250.0),
        ("macs=.75", "macs", 750.0),
        (" Params = 0.1 ", "params", 100.0),
        ("macs=1.2G", "macs", 1.2e9),
        ("params=3M", "params", 3e6),
        ("params=250k", "params", 250e3),
        ("size=5MB", "size", 5e6),
        ("size=5MiB", "size", 5 * 2**20),
        ("size=1e3", "size", 1000.0),
        ("macs=2", "macs", 2.0),
        ("latency=0.6", "latency", 600.0),
        ("latency=60%", "latency", 600.0),
        ("latency=12ms", "latency", 12.0),
        ("latency=1.5 s", "latency", 1500.0),
        ("latency=250us", "latency", 0.25),
        ("latency=250µs", "latency", 0.25),
    ],
)
def test_what_is_to_remain_of_a_thousand(text: str, metric: str, goal: float) -> None:
    target = parse_target(text)
    assert (target.metric, target.text) == (metric, text)
    assert target.goal(1000) == pytest.approx(goal)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "macs",
        "0.5",
        "macs=",
        "flops=0.5",
        "macs=half",
        "macs=-0.5",
        "macs=0",
        "macs=1",
        "macs=100%",
        "macs=0%",
        "macs=150%",
        "macs=5 parsecs",
        "channels=16",
        "channels=2k",
        "macs=0.5=0.5",
        "macs=nan",
        "macs=inf",
        "macs=1,5",
        "size=0MB",
        "macs=0G",
        "macs=1e999",
        "macs=5ms",
        "latency=12",
        "latency=2m",
        "latency=1MB",
        "latency=0ms",
    ],
)
def test_what_makes_no_sense_is_refused_with_the_way_to_write_it(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_target(text)
    assert caught.value.exit_code == 2 and caught.value.hint


@given(st.sampled_from(METRICS), st.floats(0.001, 0.999))
def test_a_fraction_and_its_percentage_mean_the_same(metric: str, fraction: float) -> None:
    assert parse_target(f"{metric}={fraction:.6f}").goal(1e6) == pytest.approx(
        parse_target(f"{metric}={100 * float(f'{fraction:.6f}'):.6f}%").goal(1e6), rel=1e-6
    )


@given(st.text(max_size=30))
def test_any_text_is_a_target_or_a_usage_error(text: str) -> None:
    try:
        target = parse_target(text)
    except UsageError:
        return
    assert target.metric in METRICS and target.goal(100) > 0
