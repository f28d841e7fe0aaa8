"""`compress` tried on one model after the other, each trial a plain dictionary, whatever happens to it.

A trial runs in this process, or in child processes that live on from trial to trial and are replaced when one crashes
or takes too long. Started as a program, this file is such a child: a line of JSON in, a line of JSON out.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import local
from typing import Any

__all__ = ["Trial", "exit_counts", "run_all", "trial"]

Trial = dict[str, Any]
CRASH, TIMEOUT = "crash", "time"  # stand for an exit code


def trial(path: str, target: str, latency: float = 0.0, best_effort: bool = False) -> Trial:
    """What becomes of one model.

    coverage: share of all parameters in a group; initializers: of those in initializers that a node reads; exact:
    in groups that need no --allow-inexact. latency: seconds per model to measure for, 0 for not at all.
    """
    from onnxprune import OnnxPruneError, compress, inspect

    start = time.perf_counter()
    found: Trial = {"path": path, "exit": 1, "reason": "", "barrier": ""}
    try:
        seen = inspect(path)
        found.update(
            coverage=seen.analysis.coverage.fraction,
            exact=seen.analysis.coverage.params_exact / max(seen.analysis.coverage.params_total, 1),
            initializers=initializer_coverage(seen.analysis),
            groups=len(seen.analysis.groups),
            nodes=len(seen.analysis.graph.nodes),
            params=seen.summary.params,
            macs=seen.summary.macs,
            load_s=seen.load_s,
            analyse_s=seen.analyse_s,
        )
        if seen.analysis.barriers:
            first = seen.analysis.barriers[0]
            found["barrier"] = f"{first.barrier.op_type} {first.barrier.node}: {first.barrier.reason}"
        with tempfile.TemporaryDirectory(prefix="trial-") as folder:
            output = Path(folder, "pruned.onnx")
            result = compress(path, output, target=target, best_effort=best_effort)
            assert result.after is not None and result.verification is not None
            found.update(
                exit=0 if result.verification.passed else 5,
                params_after=result.after.params,
                macs_after=result.after.macs,
                error=result.verification.max_rel_error,
                reached=result.target.reached,
                met=result.target.met,
                warnings=result.warnings,
            )
            if latency:
                found.update(measured(path, output, latency))
    except OnnxPruneError as error:
        found.update(exit=error.exit_code, reason=f"{type(error).__name__}: {error}")
    except Exception as error:  # the table goes on; this is what it is there to show
        found.update(exit=1, reason=f"{type(error).__name__}: {error}")
    found["seconds"] = time.perf_counter() - start
    return found


def measured(before: str, after: Path, seconds: float) -> Trial:
    from onnxprune import OnnxPruneError
    from onnxprune.verify.latency import compare

    try:
        latency = compare(before, after, seconds=seconds)
    except OnnxPruneError as error:
        return {"latency_note": str(error)}
    return {
        "before_ms": latency.before.median_ms,
        "after_ms": latency.after.median_ms,
        "significant": latency.significant,
    }


def initializer_coverage(analysis: Any) -> float:
    """Share of the numbers in initializers which some node reads that lie in a group."""
    total = inside = 0.0
    for name, parameter in analysis.graph.parameters.items():
        if parameter.node is None and name in analysis.covered:
            total += parameter.size
            inside += parameter.size * analysis.covered[name]
    return inside / total if total else 0.0


class _Child:
    """A child process that runs trials."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def run(self, request: dict[str, Any], limit: float) -> Trial:
        start = time.perf_counter()
        if self.process is None:
            self.process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        process = self.process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
        answer = b""
        while not answer.endswith(b"\n"):
            left = limit - (time.perf_counter() - start)
            if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
                return self.lost(request, TIMEOUT, f"did not end in {limit:.0f} s", start)
            piece = os.read(process.stdout.fileno(), 1 << 16)
            if not piece:
                code = process.wait()
                return self.lost(request, CRASH, f"the process ended with {code}", start)
            answer += piece
        found: Trial = json.loads(answer)
        return found

    def lost(self, request: dict[str, Any], code: str, reason: str, start: float) -> Trial:
        self.close()
        return {
            "path": request["path"],
            "exit": code,
            "reason": reason,
            "barrier": "",
            "seconds": time.perf_counter() - start,
        }

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def run_all(
    paths: Sequence[Path], target: str, *, jobs: int, limit: float, latency: float = 0.0, best_effort: bool = False
) -> Iterator[Trial]:
    """Trials as they end. jobs: child processes; 0 runs them in this one, without a time limit."""
    requests: list[dict[str, Any]] = [
        {"path": str(p), "target": target, "latency": latency, "best_effort": best_effort} for p in paths
    ]
    if jobs == 0:
        for request in requests:
            yield trial(**request)
        return
    mine, children = local(), []

    def work(request: dict[str, Any]) -> Trial:
        if not hasattr(mine, "child"):
            mine.child = _Child()
            children.append(mine.child)
        found: Trial = mine.child.run(request, limit)
        return found

    with ThreadPoolExecutor(jobs) as pool:
        try:
            for done in as_completed([pool.submit(work, r) for r in requests]):
                yield done.result()
        finally:
            pool.shutdown(cancel_futures=True)
            for child in children:
                child.close()


def exit_counts(trials: Sequence[Trial]) -> str:
    """How often each exit code came up."""
    meaning = {
        "0": "done and verified",
        "1": "internal error",
        "2": "usage",
        "3": "rejected or nothing prunable",
        "4": "target not reached",
        "5": "verification failed",
        CRASH: "process died",
        TIMEOUT: "took too long",
    }
    counts: dict[str, int] = {}
    for t in trials:
        counts[str(t["exit"])] = counts.get(str(t["exit"]), 0) + 1
    return "\n".join(f"exit {code:<5} {n:>4}  {meaning.get(code, '')}" for code, n in sorted(counts.items()))


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not come between the answers
    for line in sys.stdin.buffer:
        answers.write(json.dumps(trial(**json.loads(line))).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    main()
