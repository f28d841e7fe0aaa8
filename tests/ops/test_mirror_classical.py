"""Classical machine learning in the mirror."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from onnxprune.errors import NotMirrored
from onnxprune.mirroring import mirror
from tests.ops.mirroring import agree, one_node

RNG = np.random.default_rng(0)
X = RNG.standard_normal((4, 3)).astype(np.float32)
MISSING = np.where(X > 0.5, np.nan, X).astype(np.float32)
WHOLE = np.array([[1, 5, 2], [7, 2, 1]])
ROWS = RNG.standard_normal(9).tolist()

# name: (operator, inputs, attributes)
CASES: dict[str, tuple[str, list[Any], dict[str, Any]]] = {
    "Scaler": ("Scaler", [X], {"offset": [1.0, 2.0, 3.0], "scale": [0.5, 2.0, -1.0]}),
    "Scaler one": ("Scaler", [X], {"offset": [1.0], "scale": [0.5]}),
    "Scaler of integers": ("Scaler", [WHOLE], {"offset": [0.0, 2.0, 3.0], "scale": [0.5, 2.0, -1.0]}),
    **{f"Normalizer {norm}": ("Normalizer", [X], {"norm": norm}) for norm in ("MAX", "L1", "L2")},
    "Imputer": ("Imputer", [MISSING], {"imputed_value_floats": [1.0, 2.0, 3.0], "replaced_value_float": np.nan}),
    "Imputer of a number": ("Imputer", [X.round()], {"imputed_value_floats": [7.5], "replaced_value_float": 1.0}),
    "Imputer of integers": ("Imputer", [WHOLE], {"imputed_value_int64s": [9], "replaced_value_int64": 2}),
    "Binarizer": ("Binarizer", [X], {"threshold": 0.25}),
    "LinearRegressor": ("LinearRegressor", [X], {"coefficients": ROWS, "intercepts": ROWS[:3], "targets": 3}),
    "LinearRegressor one": ("LinearRegressor", [X], {"coefficients": ROWS[:3]}),
    **{
        f"LinearClassifier {kind}": (
            "LinearClassifier",
            [X],
            {
                "coefficients": ROWS,
                "intercepts": ROWS[3:6],
                "classlabels_ints": [3, 9, 4],
                "post_transform": kind,
                "count": 2,
            },
        )
        for kind in ("NONE", "SOFTMAX", "LOGISTIC")
    },
    "LabelEncoder": (
        "LabelEncoder",
        [WHOLE],
        {"keys_int64s": [1, 2, 7], "values_floats": [0.5, 1.5, 2.5], "default_float": -3.0},
    ),
    "LabelEncoder of floats": (
        "LabelEncoder",
        [np.array([1.5, 2.0, 3.0], np.float32)],
        {"keys_floats": [1.5, 2.0], "values_int64s": [10, 20], "default_int64": 30},
    ),
    "OneHotEncoder": ("OneHotEncoder", [WHOLE], {"cats_int64s": [1, 2, 5], "zeros": 1}),
    "ArrayFeatureExtractor": ("ArrayFeatureExtractor", [X, np.array([2, 0])], {}),
}


def model(op: str, inputs: list[Any], attributes: dict[str, Any]) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    proto, fed = one_node(op, inputs, domain="ai.onnx.ml", **attributes)
    proto.opset_import.append(helper.make_opsetid("ai.onnx.ml", 2))
    return proto, fed


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_computes_what_onnxruntime_does(case: tuple[str, list[Any], dict[str, Any]]) -> None:
    agree(*model(*case))


def test_strings_are_named_as_what_stands_in_the_way() -> None:
    proto, _ = model(
        "LinearClassifier", [X], {"coefficients": ROWS, "classlabels_strings": ["a", "b", "c"], "count": 2}
    )
    with pytest.raises(NotMirrored, match="class labels are strings"):
        mirror(proto)
