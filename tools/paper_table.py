"""The tables of the methods' papers, computed again: ours beside the published figures.

    python tools/paper_table.py --config resnet50 --data-dir DATA --work FOLDER --device cuda
    python tools/paper_table.py --config all --data-dir DATA --work FOLDER --dry-run

vgg16, vgg16_bn, resnet18, resnet50   CIFAR-10, trained and pruned once from random weights by DHSPG and HESSO
                                      (Only-Train-Once, arXiv 2303.06862, 2409.09085), by the published share of groups
                                      and, beside it, to the published MACs
resnet56                              CIFAR-10, a trained network to the published MACs of the ratios 0.7, 0.9 and 0.95
                                      per layer: TPP (arXiv 2207.12534), L1 and fine-tuning, L1 at TPP's epochs, FixReg,
                                      GReg. As published, layers inside the residual blocks only
sst2                                  a transformer encoder (4 layers, 256 wide) on SST-2: DHSPG, HESSO, TPP, one-shot
carn                                  CARN x2 on T91 by HESSO, PSNR of Y on Set14 and Set5; published is training on
                                      DIV2K, which is not at hand: compare the drop

A row is computed once and kept in FOLDER/rows.jsonl, and a run that is interrupted goes on from its checkpoint, so that
the same command is repeated until the table is whole. The full runs take a GPU: about 300 epochs of CIFAR-10 per row.
--shorten 10 divides all epochs by 10 (and is a row of its own), --arms takes some rows only, --seed another seed.
--dry-run goes through the same code at a tiny width, a few steps and a few samples, in a minute or less each on a CPU;
its figures mean nothing.

Accuracy (PSNR) is that of the written file in onnxruntime. CIFAR-10 in DATA is re-encoded as JPEG: compare drops and
shares with the published, and not the accuracies themselves. DATA holds cifar10_{train,test}.npz (packed JPEG),
sst2_{train,dev}.tsv, bert_uncased_vocab.txt, sr_t91_bmp.zip and sr_set5_set14_bmp.zip.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from _common import machine_note, print_table, write_json
from _paper_configs import CONFIGS, Config, PaperArm, Task
from _paper_networks import export, seeded
from _paper_runs import Rows, compressed, trained
from torch import nn

from onnxprune import TrainSettings

Row = dict[str, Any]
TINY_STEPS = 20
TINY_BATCH = 16


@dataclass(frozen=True)
class Paper:
    """One configuration on one machine."""

    name: str
    config: Config
    data: Path
    work: Path
    device: str
    dry: bool
    shorten: int
    seed: int
    threads: int

    @cached_property
    def task(self) -> Task:
        return self.config.task(self.data, self.work, self.dry)

    @cached_property
    def rows(self) -> Rows:
        return Rows(self.work / "rows.jsonl")

    def settings(self, how: Mapping[str, Any], seed: int) -> TrainSettings:
        """The published settings; of a dry run, a few steps of them."""
        settings = TrainSettings(**how, device=self.device, channels_last=self.task.example.ndim == 4, seed=seed)
        if self.dry:
            return replace(settings, epochs=None, steps=TINY_STEPS, batch=TINY_BATCH)
        if settings.epochs is not None:
            return replace(settings, epochs=max(1, settings.epochs // self.shorten))
        assert settings.steps is not None
        return replace(settings, steps=settings.steps // self.shorten)

    def base(self) -> Row:
        """The network trained whole."""

        def work() -> Row:
            path = self._path("base")
            settings = self.settings(self.config.base, self.seed)
            task = self.task
            module, seconds = trained(
                self._network(), task.train, task.loss, settings, run_dir=path.with_suffix(".run")
            )
            self._export(module, path)
            return {"file": path.name, "macs": 1.0, "params": 1.0, "seconds": seconds, "values": self._values(path)}

        return self.rows.once(self._key("base"), work)

    def arm(self, arm: PaperArm) -> Row:
        """The network made smaller."""

        def work() -> Row:
            path, task = self._path(arm.name), self.task
            if arm.scratch:
                start = self._path("random")
                self._export(self._network(), start)
            else:
                start = self.work / self.base()["file"]
            row = compressed(
                replace(arm.arm, options={**task.options, **arm.arm.options}),
                start,
                path,
                task.train,
                task.loss,
                self.settings(arm.settings, self.seed + 1),
                seed=self.seed,
                run_dir=path.with_suffix(".run"),
            )
            return row | {"file": path.name, "values": self._values(path)}

        return self.rows.once(self._key(arm.name), work)

    def _network(self) -> nn.Module:
        return seeded(self.task.network, self.seed)

    def _export(self, module: nn.Module, path: Path) -> None:
        task = self.task
        export(module, path, task.example, name=task.input_name, output=task.output_name, free=task.free)

    def _values(self, path: Path) -> dict[str, float]:
        return self.task.values(path, self.threads)

    def _key(self, arm: str) -> Row:
        return {"config": self.name, "arm": arm, "dry": self.dry, "shorten": self.shorten, "seed": self.seed}

    def _path(self, arm: str) -> Path:
        plain = re.sub("[^a-z0-9.=]+", "-", arm.lower())
        return self.work / f"{self.name}{'-dry' if self.dry else ''}-{self.shorten}-{self.seed}-{plain}.onnx"


def show(paper: Paper, arms: Sequence[PaperArm]) -> int:
    """Print the table of a configuration, computing what is not there yet. Returns how many rows failed."""
    config, task = paper.config, paper.task
    base = _told(paper, "base", paper.base())
    if "failure" in base:
        return 1
    table = [["base", *_cells(task, base, base), "100", "100", config.published_base, "", f"{base['seconds']:.0f}"]]
    failed = 0
    for arm in arms:
        row, p = _told(paper, arm.name, paper.arm(arm)), arm.published
        failed += "failure" in row
        seconds = "" if "failure" in row else f"{row['seconds']:.0f}"
        table.append([arm.name, *_cells(task, row, base), p.macs, p.params, p.value, p.drop, seconds])
    head = ["", "MACs %", "params %", *task.metrics, "drop"]
    head += [f"published {x}" for x in ("MACs %", "params %", "value", "drop")] + ["seconds"]
    print_table(head, table, f"{config.title}{' (dry run: the figures mean nothing)' if paper.dry else ''}")
    print(config.note, flush=True)
    return failed


def _told(paper: Paper, arm: str, row: Row) -> Row:
    """The row, said when it is there: a table may take days."""
    said = row.get("failure") or ", ".join(f"{n} {v:.4g}" for n, v in row["values"].items())
    print(f"{paper.name}, {arm}: {said}", flush=True)
    return row


def _cells(task: Task, row: Row, base: Row) -> list[str]:
    """MACs, parameters, the metrics, and the drop of the first of them."""
    if "failure" in row:
        return ["failed", *[""] * (len(task.metrics) + 2)]
    values = [task.scale * row["values"][m] for m in task.metrics]
    drop = task.scale * base["values"][task.metrics[0]] - values[0]
    return [f"{100 * row['macs']:.1f}", f"{100 * row['params']:.1f}", *(f"{v:.2f}" for v in values), f"{drop:.2f}"]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=(*CONFIGS, "all"), required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for what is kept")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--arms", default="", help="regular expression: rows whose names it is found in")
    parser.add_argument("--shorten", type=int, default=1, help="divide all epochs by this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--dry-run", action="store_true", help="tiny networks, a few steps")
    parser.add_argument("--json", type=Path, help="write all rows here")
    return parser.parse_args()


def main() -> None:
    o = _options()
    torch.set_num_threads(o.threads)
    o.work.mkdir(parents=True, exist_ok=True)
    print(machine_note(), flush=True)
    failed = 0
    for name in CONFIGS if o.config == "all" else (o.config,):
        config = CONFIGS[name]()
        paper = Paper(name, config, o.data_dir, o.work, o.device, o.dry_run, o.shorten, o.seed, o.threads)
        failed += show(paper, [a for a in config.arms if re.search(o.arms, a.name)])
    write_json(o.json, Rows(o.work / "rows.jsonl").all())
    if failed:
        raise SystemExit(f"{failed} rows failed")


if __name__ == "__main__":
    main()
