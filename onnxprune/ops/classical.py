"""Operators of classical machine learning. They hold no channels, but networks stand behind and before them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from onnxprune.ops.lazy import F, kernels, torch
from onnxprune.ops.registry import Operator
from onnxprune.ops.rules import AxisContext, MirrorContext

__all__ = ["OPERATORS"]

_run = kernels("classical")


def featurewise_axes(c: AxisContext) -> None:
    """Every feature has a constant of its own in an attribute."""
    x = c.axes(0)
    c.freeze(f"a {c.node.op} has attributes per feature", *x[-1:])
    c.output(*x)


def _as_floats(node, inputs):
    return [(1, inputs[0][1])]


def as_float(m: MirrorContext, i: int = 0) -> Any:
    """Input i as float32, which these operators compute in."""
    x = m.tensor(i)
    return x if m.dtype(i) == torch.float32 else x.to(torch.float32)


def array(m: MirrorContext, name: str, dtype: Any = np.float32) -> np.ndarray | None:
    """An attribute that lists numbers."""
    values = m.attr(name)
    return None if values is None else np.asarray(values, dtype)


def scaler_mirror(m: MirrorContext) -> Any:
    x, offset, scale = as_float(m), array(m, "offset"), array(m, "scale")
    if offset is not None and np.any(offset):
        x = x - m.buffer(offset)
    return x if scale is None else x * m.buffer(scale)


def imputer_mirror(m: MirrorContext) -> Any:
    """What is missing is not a number, unless a number stands for it."""
    values = array(m, "imputed_value_floats")
    if values is not None:
        return m.call(_run.imputed, as_float(m), m.buffer(values), float(m.attr("replaced_value_float", math.nan)))
    whole = array(m, "imputed_value_int64s", np.int64)
    if whole is None:
        raise m.unsupported("it has no values to put in")
    return m.call(_run.imputed, m.tensor(0), m.buffer(whole), int(m.attr("replaced_value_int64", 0)))


def post_transformed(m: MirrorContext, scores: Any) -> Any:
    kind = m.attr("post_transform", "NONE")
    if kind == "NONE":
        return scores
    if kind == "SOFTMAX":
        return torch.softmax(scores, -1)
    if kind == "LOGISTIC":
        return torch.sigmoid(scores)
    raise m.unsupported(f"the transform {kind}")


def linear_scores(m: MirrorContext, rows: int) -> Any:
    """x W^T + b of attributes that hold W flat."""
    coefficients, intercepts = array(m, "coefficients"), array(m, "intercepts")
    assert coefficients is not None
    bias = None if intercepts is None or not np.any(intercepts) else m.buffer(intercepts)
    return F.linear(as_float(m), m.buffer(coefficients.reshape(rows, -1)), bias)


def linear_regressor_mirror(m: MirrorContext) -> Any:
    return post_transformed(m, linear_scores(m, int(m.attr("targets", 1))))


def linear_classifier_mirror(m: MirrorContext) -> Any:
    labels = array(m, "classlabels_ints", np.int64)
    if labels is None:
        raise m.unsupported("its class labels are strings")
    intercepts = array(m, "intercepts")
    rows = len(labels) if intercepts is None else len(intercepts)
    if rows != len(labels):
        raise m.unsupported("one row of coefficients for two classes")
    scores = post_transformed(m, linear_scores(m, rows))
    return [m.buffer(labels)[torch.argmax(scores, -1)], scores]


def label_encoder_mirror(m: MirrorContext) -> Any:
    kinds = {"int64s": np.int64, "floats": np.float32}
    keys = next((k for n, t in kinds.items() if (k := array(m, f"keys_{n}", t)) is not None), None)
    kind = next((n for n in kinds if m.attr(f"values_{n}") is not None), None)
    if keys is None or kind is None:
        raise m.unsupported("it maps strings")
    values = array(m, f"values_{kind}", kinds[kind])
    assert values is not None
    default = int(m.attr("default_int64", -1)) if kind == "int64s" else float(m.attr("default_float", -0.0))
    return m.call(_run.mapped, m.tensor(0), m.buffer(keys), m.buffer(values), default)


def one_hot_encoder_mirror(m: MirrorContext) -> Any:
    categories = array(m, "cats_int64s", np.int64)
    if categories is None:
        raise m.unsupported("its categories are strings")
    return m.call(_run.encoded, m.tensor(0), m.buffer(categories))


def feature_vectorizer_mirror(m: MirrorContext) -> Any:
    return torch.cat([as_float(m, i) for i in range(len(m.node.inputs))], -1)


def binarizer_mirror(m: MirrorContext) -> Any:
    return (m.tensor(0) > float(m.attr("threshold", 0.0))).to(torch.float32)


_NAMED: dict[str, Any] = {
    "Scaler": scaler_mirror,
    "Imputer": imputer_mirror,
    "Normalizer": lambda m: m.call(_run.normalized, as_float(m), m.attr("norm", "MAX")),
}

OPERATORS = (
    *(Operator(f"ai.onnx.ml::{n}", featurewise_axes, shape=_as_floats, mirror=rule) for n, rule in _NAMED.items()),
    Operator("ai.onnx.ml::Binarizer", mirror=binarizer_mirror),
    Operator("ai.onnx.ml::LinearRegressor", mirror=linear_regressor_mirror),
    Operator("ai.onnx.ml::LinearClassifier", mirror=linear_classifier_mirror),
    Operator("ai.onnx.ml::LabelEncoder", mirror=label_encoder_mirror),
    Operator("ai.onnx.ml::OneHotEncoder", mirror=one_hot_encoder_mirror),
    Operator("ai.onnx.ml::FeatureVectorizer", mirror=feature_vectorizer_mirror),
    Operator("ai.onnx.ml::ArrayFeatureExtractor", mirror=lambda m: m.call(_run.picked, m.tensor(0), m.tensor(1))),
)
