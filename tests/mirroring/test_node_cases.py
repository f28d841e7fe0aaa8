"""ONNX's own node tests through the mirror: every case passes but for those listed here, and those listed fail.

`python tools/mirror_node_tests.py --operator NAME --verbose` shows what is behind a failure.
"""

from __future__ import annotations

import re

import pytest

from tools._node_cases import PASSED, Case, cases, run, stored

KNOWN = {  # cases that can't pass, as regular expressions of their names
    r"test_attention_4d_fp16|test_attention_4d_causal_fp16(_expanded)?": "float16, rounded in another order",
    r"test_dft_inverse(_opset19)?": "recorded rounding errors, where the exact value is 0, are beyond the tolerance",
    r"test_resize_downsample_scales_(linear|cubic)_align_corners": "recorded for another scale than onnxruntime takes",
    r"test_not_\dd": "of opset 1, which the model loader refuses",
    r"test_image_decoder_.*": "decodes images: nothing behind it can be trained through it",
    r"test_tfidfvectorizer_.*": "counts n-grams: nothing behind it can be trained through it",
}


def by_operator() -> dict[str, list[Case]]:
    found: dict[str, list[Case]] = {}
    for case in cases().values():
        found.setdefault(case.operator, []).extend(c for c in (case, stored(case)) if c is not None)
    return found


BY_OPERATOR = by_operator()


def known(case: Case) -> bool:
    name = case.name.removesuffix("_stored")
    return any(re.fullmatch(pattern, name) for pattern in KNOWN)


def test_there_are_cases_to_run() -> None:
    assert len(BY_OPERATOR) > 170 and sum(map(len, BY_OPERATOR.values())) > 2000


@pytest.mark.parametrize("operator", sorted(BY_OPERATOR))
def test_the_recorded_outputs_come_out(operator: str) -> None:
    outcomes = {case.name: (known(case), run(case)) for case in BY_OPERATOR[operator]}
    failed = {n: o.reason for n, (excused, o) in outcomes.items() if o.status != PASSED and not excused}
    assert not failed
    improved = [n for n, (excused, o) in outcomes.items() if o.status == PASSED and excused]
    assert not improved, "take them off KNOWN"


def test_every_exception_names_a_case() -> None:
    names = list(cases())
    assert all(any(re.fullmatch(pattern, n) for n in names) for pattern in KNOWN)
