"""onnxsim's side of `rival_onnxsim.py`. Runs in a Python that has onnxsim and onnxruntime (and sympy, for onnxruntime's
transformer optimiser), and knows nothing of onnxprune.

It reads requests from stdin, one JSON object per line, and answers each on stdout with one:

    {"do": "prepare", "model": PATH, "out": FOLDER}
        the model in every form that may suit the pruning better: {"forms": {NAME: PATH}, "failed": {NAME: why}}
    {"do": "prune", "model": PATH, "out": PATH, "sparsity": 0.5, "ranking": "l2", "calibration": NPZ}
        whole channels first, then attention heads; ranking l1 and l2 look at weights, wanda at activations too
    {"do": "recover", "original": PATH, "pruned": PATH, "out": PATH, "recovery": "ridge", "calibration": NPZ}
        ridge: closed-form fit of MatMul and Gemm; blocks: gradient steps on blocks of them; bn: BatchNormalization
        put behind each Conv, with statistics measured and matched to the original's; ridge+bn

Calibration is an .npz file of arrays by input name, (feeds, ...). Answers hold "seconds", or "error".
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxsim

UNSUITED = ["fuse_matmul_add_bias_into_gemm_batched", "fuse_qkv"]  # passes of simplify after which chains aren't found


def forms(path: str) -> dict[str, Callable[[], onnx.ModelProto]]:
    def optimised() -> onnx.ModelProto:
        from onnxruntime.transformers.optimizer import optimize_model

        plain = onnxsim.simplify(path, skipped_optimizers=[*UNSUITED, "fuse_attention"])[0]
        return optimize_model(plain, model_type="bert", num_heads=0, hidden_size=0, opt_level=0).model

    return {
        "as it is": lambda: onnx.load(path),
        "simplified": lambda: onnxsim.simplify(path)[0],
        "opset 20": lambda: onnxsim.simplify(path, target_opset_version=20, skipped_optimizers=UNSUITED)[0],
        "optimised": optimised,
    }


def prepare(model: str, out: str) -> dict[str, Any]:
    made, failed = {}, {}
    for name, form in forms(model).items():
        path = Path(out) / f"{name.replace(' ', '-')}.onnx"
        try:
            onnx.save(form(), path)
            made[name] = str(path)
        except Exception as error:
            failed[name] = short(error)
    return {"forms": made, "failed": failed}


def feeds(calibration: str) -> list[dict[str, np.ndarray]]:
    with np.load(calibration) as stored:
        arrays = {name: stored[name] for name in stored.files}
    return [{n: a[k] for n, a in arrays.items()} for k in range(len(next(iter(arrays.values()))))]


def prune(model: str, out: str, sparsity: float, ranking: str = "l2", calibration: str = "") -> dict[str, Any]:
    start, loaded = time.perf_counter(), onnx.load(model)
    if ranking == "wanda":
        data = feeds(calibration)
        loaded = onnxsim.apply_structured_wanda_pruning(loaded, data, sparsity=sparsity)
        loaded = onnxsim.apply_attention_head_wanda_pruning(loaded, data, sparsity=sparsity)
    else:
        loaded = onnxsim.apply_structured_pruning(loaded, sparsity=sparsity, importance_norm=ranking)
        loaded = onnxsim.apply_attention_head_pruning(loaded, sparsity=sparsity, importance_norm=ranking)
    onnx.save(loaded, out)
    return {"seconds": time.perf_counter() - start}


def recover(original: str, pruned: str, out: str, recovery: str, calibration: str) -> dict[str, Any]:
    start, whole, small = time.perf_counter(), onnx.load(original), onnx.load(pruned)
    data = feeds(calibration)
    notes = []
    for step in recovery.split("+"):
        if step == "ridge":
            small = onnxsim.apply_pruning_finetune(whole, small, data)
        elif step == "blocks":
            small, results = onnxsim.apply_block_finetune_all_blocks(whole, small, calibration_data=data)
            notes += [str(r)[:200] for r in results]
        elif step == "bn":
            from onnxsim.bn_recovery import recover_batch_norm

            small = recover_batch_norm(small, calibration_data=data, target_model=whole)
    onnx.save(small, out)
    return {"seconds": time.perf_counter() - start, "notes": notes}


def short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def main() -> None:
    warnings.simplefilter("ignore")
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print as well
    work: dict[str, Callable[..., dict[str, Any]]] = {"prepare": prepare, "prune": prune, "recover": recover}
    print(json.dumps({"version": version("onnxsim")}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = work[request.pop("do")](**request)
        except Exception as error:
            answer = {"error": short(error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
