"""Accuracy of small networks: every method on the same data, loop, budgets and cost model.

``python -m benchmarks accuracy --suite digits`` runs what its file of rows does not hold yet: it
may be stopped at any time and started again. Decisions are made on validation images, which are
held out of the training images; the test images are read once, at the end of a run.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import psap
from benchmarks import rows
from benchmarks.methods import METHODS, Method, Task
from benchmarks.settings import SETTINGS, SUITES, Setting, as_row
from psap import data
from psap.cost import CostModel
from psap.data.loader import Loader, Subset
from psap.errors import PsapError
from psap.models import create

Row = dict[str, Any]
KEEPS = (0.5, 0.3, 0.15, 0.07)
CACHE = Path(tempfile.gettempdir()) / "psap-accuracy"


@cache
def _spec(setting: Setting, seed: int, folder: Path | None) -> data.DataSpec:
    spec = data.load(
        setting.data,
        data_dir=folder,
        seed=seed,
        batch_size=setting.batch,
        val_share=setting.val_share,
        pictures=setting.pictures,
    )
    return spec.as_format(setting.memory_format)


def _first(loader: Loader, count: int | None) -> Loader:
    if count is None or count >= len(loader.images):
        return loader
    order = np.random.default_rng([loader.seed, 7]).permutation(len(loader.images))
    images = Subset(source=loader.images, indices=torch.from_numpy(np.sort(order[:count])))
    return replace(loader, images=images)


@torch.inference_mode()
def accuracy(model: nn.Module, loader: Loader, device: str = "cpu") -> float:
    """Share of the images that are classified correctly."""
    model.eval()
    right = sum(int((model(x.to(device)).argmax(1) == y.to(device)).sum()) for x, y in loader)
    return right / len(loader.images)


def sgd(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """The optimizer of every run."""
    return torch.optim.SGD(
        model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, nesterov=True
    )


class Bench:
    """One setting with one seed: data, and the network that every method starts from.

    Args:
        setting: what all methods share.
        seed: of splits, order, fresh weights, and whatever a method draws.
        folder: where the data is; None for the digits.
        weights: pretrained weights (safetensors); without them a dense network is trained first.
        cache: keeps dense networks that were trained here.
        device: where the network trains.
    """

    def __init__(
        self,
        setting: Setting,
        seed: int,
        *,
        folder: Path | None = None,
        weights: Path | None = None,
        cache: Path = CACHE,
        device: str = "cpu",
    ) -> None:
        self.setting, self.seed, self.weights, self.cache = setting, seed, weights, cache
        self.device = device
        self.spec = _spec(setting, seed, folder)
        if self.spec.val is None:
            raise ValueError("no image is left for validation; raise Setting.val_share")
        self.val = self.spec.val
        self.train = _first(self.spec.train, setting.images)
        example = next(iter(self.val))[0][:2].clone(memory_format=setting.memory_format)
        self.example = example.to(device)

    def fresh(self) -> nn.Module:
        """The network before the run."""
        torch.manual_seed(self.seed)
        spec, setting = self.spec, self.setting
        model = create(setting.network, num_classes=spec.num_classes, in_channels=spec.channels)
        model = model.to(self.device, memory_format=setting.memory_format)  # type: ignore[call-overload]
        if setting.start == "pretrained":
            missing = model.load_state_dict(
                load_file(self.weights or self._pretrained(model)), strict=False
            )
            lost = [k for k in missing.missing_keys if not k.endswith("num_batches_tracked")]
            if lost or missing.unexpected_keys:
                raise ValueError(f"{self.weights} does not fit {setting.network}: {missing}")
        return model  # type: ignore[no-any-return]

    def _pretrained(self, model: nn.Module) -> Path:
        key = repr((self.setting, self.seed, torch.__version__))
        name = f"{self.setting.network}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        file = self.cache / f"{name}.safetensors"
        if not file.exists():
            task = self.task(model, keep=1.0, epochs=self.setting.pretrain)
            self.loop(task, METHODS["dense"](), self.setting.pretrain, offset=1000)
            self.cache.mkdir(parents=True, exist_ok=True)
            save_file({k: v.contiguous() for k, v in model.state_dict().items()}, file)
        return file

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The training batches of an epoch, on the device."""
        return ((x.to(self.device), y.to(self.device)) for x, y in self.train.epoch(number))

    def task(self, model: nn.Module, *, keep: float, epochs: int) -> Task:
        """What a method gets."""
        setting = self.setting

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            return itertools.chain.from_iterable(self.epoch(e) for e in itertools.count(5000))

        return Task(
            model=model,
            optimizer=sgd(model, setting.lr),
            make_optimizer=lambda m: sgd(m, setting.lr),
            example=self.example,
            batches=batches,
            keep=keep,
            steps=epochs * len(self.train),
            prune_from=setting.prune[0],
            prune_until=setting.prune[1],
            seed=self.seed,
        )

    def loop(self, task: Task, method: Method, epochs: int, *, offset: int = 0) -> None:
        """Train; the method prunes."""
        method.begin(task)
        step = 0
        for epoch in range(epochs):
            for x, y in self.epoch(epoch + offset):
                task.model.train()
                rate = self.setting.lr * (1 + math.cos(math.pi * step / task.steps)) / 2
                for group in task.optimizer.param_groups:
                    group["lr"] = rate
                task.optimizer.zero_grad()
                F.cross_entropy(task.model(x), y).backward()
                method.gradients(task)
                task.optimizer.step()
                step += 1
                method.stepped(task, step)
        method.finish(task)

    def run(
        self, method: Method, keep: float, *, test: bool = True, save: Path | None = None
    ) -> Row:
        """One run from beginning to end; the test images are read last, and only with ``test``.

        Args:
            method: prunes.
            keep: kept share of the MACs.
            test: read the test images.
            save: file for the small network, if psap made it.
        """
        model = self.fresh()
        dense = CostModel(psap.trace(model, self.example)).dense
        task = self.task(model, keep=keep, epochs=self.setting.epochs)
        torch.manual_seed(self.seed)
        began = time.process_time()
        try:
            self.loop(task, method, self.setting.epochs)
        except PsapError as error:
            return {"refused": str(error)}
        seconds = time.process_time() - began
        if save is not None and task.result is not None:
            save.parent.mkdir(parents=True, exist_ok=True)
            psap.save(task.result, save)
        graph = psap.trace(task.model, self.example)
        small = CostModel(graph).dense
        return {
            "macs_share": small.macs / dense.macs,
            "parameter_share": small.parameters / dense.parameters,
            "val_accuracy": accuracy(task.model, self.val, self.device),
            "test_accuracy": (accuracy(task.model, self.spec.test, self.device) if test else None),
            "cpu_seconds": round(seconds, 2),
            "widths": [g.size for g in graph.groups],
            **task.notes,
        }


def _identity(row: Row) -> str:
    keys = ("method", "keep", "seed")
    tested = "refused" in row or row["test_accuracy"] is not None
    return json.dumps([as_row(row["setting"]), *(row[key] for key in keys), tested], sort_keys=True)


def _pending(file: Path, wanted: Iterator[tuple[int, str, float, str]], test: bool) -> list[Row]:
    """The runs that are not in the file, each the beginning of its row."""
    known = file.read_text().splitlines() if file.exists() else []
    done = {_identity(row) for row in map(json.loads, known)}
    found = []
    for seed, setting, keep, method in wanted:
        shared = as_row(SETTINGS[setting])
        keep = 1.0 if method == "dense" else keep
        row = {"suite": setting, "setting": shared, "method": method, "keep": keep, "seed": seed}
        key = _identity({**row, "test_accuracy": 0 if test else None})
        if key not in done:
            done.add(key)
            found.append(row)
    return found


def run(
    suite: str = "digits",
    methods: tuple[str, ...] = tuple(METHODS),
    keeps: tuple[float, ...] = KEEPS,
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    data_dir: Path | None = None,
    weights: Path | None = None,
    peers: Path | None = None,
    out: Path = rows.RESULTS,
    cache: Path = CACHE,
    threads: int = 1,
    device: str = "cpu",
    test: bool = True,
    save: Path | None = None,
) -> None:
    """Run what is not in the file yet; a row each.

    Args:
        suite: a name in `benchmarks.settings.SUITES`.
        methods: names in `benchmarks.methods.METHODS`.
        keeps: kept shares of the MACs.
        seeds: of splits, order, fresh weights.
        data_dir: the folder of the data; not for the digits.
        weights: pretrained weights, for settings that start from them.
        peers: a folder that holds torch-pruning.
        out: folder of the rows; the file is ``accuracy-<suite>.jsonl``.
        cache: keeps dense networks that were trained here.
        threads: of PyTorch.
        device: where the networks train, "cpu" or "cuda".
        test: read the test images at the end; False while methods are being developed.
        save: folder for the small networks that psap made, as files of `psap.save`.
    """
    if suite not in SUITES:
        raise ValueError(f"suite is {suite!r}; pass one of {', '.join(SUITES)}")
    if unknown := set(methods) - set(METHODS):
        raise ValueError(f"methods are {sorted(unknown)}; pass some of {', '.join(METHODS)}")
    if peers is not None:
        sys.path.insert(0, str(peers.resolve()))
    torch.set_num_threads(threads)
    name, places = f"accuracy-{suite}", {"folder": data_dir, "weights": weights, "cache": cache}
    wanted = itertools.product(seeds, SUITES[suite], keeps, methods)
    for row in _pending(out / f"{name}.jsonl", wanted, test):
        bench = Bench(SETTINGS[row["suite"]], row["seed"], device=device, **places)
        label = "-".join(str(row[key]) for key in ("suite", "method", "keep", "seed"))
        file = None if save is None else save / f"{label}.safetensors"
        found = bench.run(METHODS[row["method"]](), row["keep"], test=test, save=file)
        rows.write(name, {**row, "threads": threads, "device": device, **found}, out)
