"""The tables and verdicts of `repair_table.py`, out of its rows alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from _common import print_table, verdict
from _repairs import REPAIRS

__all__ = ["report"]

AT = 0.7  # of the MACs: where half of what is lost has to come back
SURE = 2.0  # standard errors
FAR = 0.02  # of the MACs: a plan that misses its target by more is marked

Row = dict[str, Any]


def report(rows: Sequence[Row]) -> None:
    """Print all of it."""
    models = list(dict.fromkeys(r["model"] for r in rows))
    for model in models:
        table(model, [r for r in rows if r["model"] == model])
    good = [r for r in rows if "why" not in r]
    most = max((r["samples"] for r in good), default=0)
    if most:
        recovered([r for r in good if r["kind"] == "top1" and r["macs"] == AT and r["samples"] == most], most)
        worse([r for r in good if r["repair"] == "affine" and r["samples"] == most], most)


def table(model: str, rows: Sequence[Row]) -> None:
    """A line per ranking and inputs, a column per share of MACs."""
    good = [r for r in rows if "why" not in r]
    wrong = dict.fromkeys(r["why"] for r in rows if "why" in r and ("macs" in r or not good))
    if good:
        macs = sorted({r["macs"] for r in good}, reverse=True)
        repairs = [m for m in REPAIRS if any(r["repair"] == m for r in good)]
        # what l2 chooses is the same with any inputs, and so is what there is before repair
        bare = {(r["ranking"], r["samples"], r["macs"]): r for r in good if r["repair"] == "none"}
        bare |= {(k[0], n, k[2]): r for k, r in bare.items() if k[1] == 0 for n in {r["samples"] for r in good}}
        lines = dict.fromkeys((r["ranking"], r["samples"], r["inputs"]) for r in good if r["inputs"])
        body = []
        for ranking, samples, inputs in lines or dict.fromkeys((*k[:2], "") for k in bare):
            mine = {(r["macs"], r["repair"]): r for r in good if line(r) == (ranking, samples, inputs)}
            mine |= {(m, "none"): bare[ranking, samples, m] for m in macs if (ranking, samples, m) in bare}
            seconds = [median(r["seconds"] for (_, n), r in mine.items() if n == name) for name in repairs[1:]]
            spent = median(r["ranking_s"] for r in mine.values())
            body.append(
                [
                    ranking,
                    f"{samples} {inputs}",
                    *(cell([mine.get((m, name)) for name in repairs]) for m in macs),
                    spent,
                    " / ".join(seconds),
                ]
            )
        first = good[0]
        print_table(
            ["ranking", "inputs", *(f"macs {m:g}" for m in macs), "ranking s", "repair s"],
            body,
            f"{model}: {first['kind']}, original {first['original']:.3f}, {first['tests']} test inputs; "
            f"{' / '.join(repairs)}",
        )
    for why in wrong:
        print(f"  {model}: {why}")


def line(row: Row) -> tuple[str, int, str]:
    return row["ranking"], row["samples"], row["inputs"]


def cell(found: Sequence[Row | None]) -> str:
    texts = ["-" if r is None else f"{r['score']:.3f}" for r in found]
    reached = next((r for r in found if r is not None), None)
    missed = reached is not None and abs(reached["reached"] - reached["macs"]) > FAR
    return " / ".join(texts) + (f" at {reached['reached']:.2f}" if missed and reached else "")


def median(values: Iterable[float]) -> str:
    found = list(values)
    return f"{statistics.median(found):.1f}" if found else "-"


def recovered(rows: Sequence[Row], most: int) -> None:
    """What the affine repair brings back, per classifier and ranking."""
    body = []
    for row in (r for r in rows if r["repair"] == "affine"):
        nothing = row["lost"] <= SURE * row["lost_noise"]
        share = None if nothing else row["gain"] / row["lost"]
        body.append(
            [
                row["model"],
                row["ranking"],
                f"{row['reached']:.3f}",
                f"{row['original']:.4f}",
                f"{row['lost']:.4f} ±{row['lost_noise']:.4f}",
                f"{row['gain']:+.4f} ±{row['gain_noise']:.4f}",
                "" if share is None else f"{share:.0%}",
                "nothing lost" if share is None else verdict(share, 0.5, at_least=True),
            ]
        )
    header = ["model", "ranking", "MACs", "top-1", "lost", "affine brings", "share", "at least half"]
    print_table(header, body, f"Recovered at macs={AT:g} with {most} inputs (standard errors behind ±)")


def worse(rows: Sequence[Row], most: int) -> None:
    """Where the affine repair hurts."""
    bad = sorted((r for r in rows if r["gain"] < 0), key=lambda r: r["gain"])
    sure = sum(r["gain"] < -SURE * r["gain_noise"] for r in bad)
    body = [
        [
            r["model"],
            r["ranking"],
            f"{r['macs']:g}",
            r["kind"],
            f"{r['score'] - r['gain']:.4f}",
            f"{r['score']:.4f}",
            f"{r['gain']:+.4f} ±{r['gain_noise']:.4f}",
            f"{r['fidelity']:.3f}",
            f"{r['judged_before']:.3g} to {r['judged_after']:.3g}",
            f"{r['tests'] * -r['gain']:.3g}",
        ]
        for r in bad
    ]
    header = ["model", "ranking", "MACs", "kind", "none", "affine", "change", "fidelity", "its own judge", "inputs"]
    title = f"Affine with {most} inputs worse than none: {len(bad)} of {len(rows)} cells, {sure} by more than the noise"
    print_table(header, body, f"{title}: {'MISSED' if bad else 'met'}")
