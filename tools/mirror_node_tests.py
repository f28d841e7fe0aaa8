"""How many of the ONNX project's own node tests the mirror passes, per operator, and why the others don't.

    python tools/mirror_node_tests.py [--operator NAME ...] [--verbose] [--json FILE]

All cases of the default domain with float, integer and bool tensors are run, twice where they have integer or bool
inputs: with all inputs as graph inputs, as the ONNX project does it, and with those inputs stored in the model, as
exporters do it. Outputs are compared as the ONNX project compares them: values, types and shapes.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from _common import print_table, write_json
from _node_cases import FAILED, NOT_MIRRORED, PASSED, Case, Outcome, cases, run, stored

REASON = 150


def chosen(operators: list[str] | None, *, exact: bool) -> list[Case]:
    """The cases of operators whose name contains one of the given strings."""
    wanted = [o.lower() for o in operators or ()]
    return [
        c
        for c in cases().values()
        if not wanted or any(w == c.operator.lower() if exact else w in c.operator.lower() for w in wanted)
    ]


def summary(found: dict[str, tuple[Case, Outcome]], title: str, *, only_gaps: bool) -> None:
    """One row per operator, with the most frequent reason."""
    rows = []
    by_operator: dict[str, list[Outcome]] = {}
    for case, outcome in found.values():
        by_operator.setdefault(case.operator, []).append(outcome)
    total = Counter(o.status for _, o in found.values())
    for operator, outcomes in sorted(by_operator.items()):
        count = Counter(o.status for o in outcomes)
        reasons = Counter(o.reason for o in outcomes if o.status != PASSED)
        if reasons or not only_gaps:
            most = reasons.most_common(1)[0][0][:REASON] if reasons else ""
            rows.append([operator, count[PASSED], count[FAILED] or "", count[NOT_MIRRORED] or "", most])
    print_table(["operator", PASSED, FAILED, NOT_MIRRORED, "most frequent reason"], rows, title)
    share = total[PASSED] / max(len(found), 1)
    print(f"{len(found)} cases: {total[PASSED]} passed ({share:.1%}), ", end="")
    print(f"{total[FAILED]} failed, {total[NOT_MIRRORED]} not mirrored")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operator", action="append", help="only operators whose name contains this (repeatable)")
    parser.add_argument("--exact", action="store_true", help="--operator is the whole name")
    parser.add_argument("--verbose", action="store_true", help="every case that does not pass, with its reason")
    parser.add_argument("--gaps", action="store_true", help="leave out operators of which every case passes")
    parser.add_argument("--json", type=Path, help="write every outcome to this file")
    options = parser.parse_args()
    as_given = chosen(options.operator, exact=options.exact)
    if not as_given:
        sys.exit("no node test is about such an operator")
    as_stored = [s for s in map(stored, as_given) if s is not None]
    document = {}
    for title, group in (("Inputs as graph inputs", as_given), ("Integer and bool inputs stored", as_stored)):
        found = {case.name: (case, run(case)) for case in group}
        summary(found, title, only_gaps=options.gaps)
        for name, (_, outcome) in found.items():
            if options.verbose and outcome.status != PASSED:
                print(f"  {name}: {outcome.status}: {outcome.reason}")
        document.update(
            {n: {"operator": c.operator, "status": o.status, "reason": o.reason} for n, (c, o) in found.items()}
        )
    write_json(options.json, document)


if __name__ == "__main__":
    main()
