"""Trace, plan and apply, against a step of Torch-Pruning; very deep and very large networks.

CPU time of one thread. Half of every layer goes. The proof must hold before anything is timed.
Needs torchvision (``make zoo``) and Torch-Pruning 1.6.1 (``--peers`` may name its folder).
"""

from __future__ import annotations

import copy
import gc
import importlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import psap
from benchmarks import coverage, registry, rows
from benchmarks.timing import Times
from psap import schedule
from psap.cost import Budget, CostModel

NAMES = ("vgg16_bn", "densenet121", "resnet50", "mobilenet_v2")
LAYERS = (1_000, 10_000)
WIDTH = 64  # of the chain; 10,000 layers are 1.5 GB then, so that tensors outweigh Python's objects
LARGE = (16, 8192)  # layers and width: 1.007e9 parameters, 4 GB
Row = dict[str, Any]


class Clock:
    """CPU milliseconds of named parts, over several turns; the first turn does not count."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {}

    def __call__(self, name: str, call: Callable[[], Any]) -> Any:
        """Time one call."""
        gc.collect()
        start = time.process_time()
        result = call()
        self.times.setdefault(name, []).append((time.process_time() - start) * 1e3)
        return result

    def of(self, *names: str) -> Times:
        """Times of some parts together."""
        sums = np.sum([self.times[name] for name in names], axis=0)
        return Times.of([float(t) for t in sums[1:]])


def _halved(clock: Clock, model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, Any]:
    """One turn of psap's parts."""
    graph = clock("trace", lambda: psap.trace(model, inputs))
    plan = clock("plan", lambda: psap.plan(graph, ratio=0.5))
    return plan, clock("apply", lambda: psap.apply(model, plan, check=False))


def _peer(clock: Clock, model: nn.Module, inputs: tuple[Any, ...]) -> int:
    """One turn of Torch-Pruning on a copy; returns how many parameters it keeps."""
    pruning = importlib.import_module("torch_pruning")
    copied = copy.deepcopy(model)
    ignored = coverage.models.classifiers(copied)
    pruner = clock(
        "peer graph",
        lambda: pruning.pruner.MagnitudePruner(
            copied,
            inputs[0],
            importance=pruning.importance.MagnitudeImportance(p=2),
            pruning_ratio=0.5,
            ignored_layers=ignored,
        ),
    )
    clock("peer step", pruner.step)
    return sum(p.numel() for p in copied.parameters())


def compared(name: str, size: int, repeats: int) -> Row:
    """The row of one model of torchvision.

    Raises:
        CheckFailed: the small network is not the masked one.
    """
    torch.manual_seed(0)
    model, inputs = coverage.models.build(f"torchvision/{name}", size)
    coverage.randomise(model)
    clock = Clock()
    plan = psap.plan(psap.trace(model, inputs), ratio=0.5)
    proved = clock("proof", lambda: psap.apply(model, plan))
    error = proved.report["verification"]["max_relative_error"]
    if not error <= 1e-9:
        raise registry.CheckFailed(f"{name}: the small network differs by {error:.1e}")
    peer_kept = 0
    for _ in range(repeats + 1):
        with torch.no_grad():
            clock("forward", lambda: model.eval()(*inputs))
        _halved(clock, model, inputs)
        peer_kept = _peer(clock, model, inputs)
    own, step = clock.of("plan", "apply"), clock.of("peer step")
    return {
        **_timed(name, f"{list(inputs[0].shape)}, half of every layer", own, plan),
        "baselines": {
            "torch-pruning 1.6.1, step": {**asdict(step), "ratio": step.median_ms / own.median_ms}
        },
        **{f"{part}_ms": clock.of(part).median_ms for part in ("forward", "trace", "plan")},
        "apply_ms": clock.of("apply").median_ms,
        "proof_and_apply_ms": clock.times["proof"][0],
        "peer_graph_ms": clock.of("peer graph").median_ms,
        "kept_parameters": plan.after.parameters / plan.before.parameters,
        "peer_kept_parameters": peer_kept / plan.before.parameters,
        "error": error,
    }


def _timed(case: str, shape: str, times: Times, plan: psap.Plan) -> Row:
    return {
        "op": "plan + apply",
        "case": case,
        "shape": shape,
        "dtype": "float32",
        "layout": "contiguous",
        "device": "cpu",
        "threads": 1,
        "clock": "process_time",
        "backend": registry.serving("auto", "shrink", torch.device("cpu")),
        "bytes": 4 * (plan.before.parameters + plan.after.parameters),
        **asdict(times),
        "limit": None,
        "percent_of_limit": None,
        "baselines": {},
        "load": os.getloadavg()[0],
    }


def chain(layers: int, width: int, kernel: int) -> tuple[nn.Module, tuple[Any, ...]]:
    """Convolutions one after the other, and a small input."""
    parts: list[nn.Module] = [nn.Conv2d(3, width, kernel, padding=kernel // 2)]
    for _ in range(layers - 1):
        parts += [nn.ReLU(), nn.Conv2d(width, width, kernel, padding=kernel // 2)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]
    return nn.Sequential(*parts, *head), (torch.randn(1, 3, 2, 2),)


def _memory(field: str) -> int:
    """Bytes of this process in memory: "VmRSS" now, "VmHWM" at most (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def deep(layers: int, width: int, kernel: int, repeats: int) -> Row:
    """The row of one chain; for a process of its own, since memory is that of the process."""
    torch.set_num_threads(1)
    for public in psap.__all__:
        getattr(psap, public)
    psap.apply(*_warm())
    before, clock = _memory("VmRSS"), Clock()
    model, inputs = chain(layers, width, kernel)
    plan = None
    for turn in range(repeats + 1):
        plan, result = _halved(clock, model, inputs)
        if turn < repeats:
            del result
    nets = 4 * (plan.before.parameters + plan.after.parameters)
    memory = (_memory("VmHWM") - before) / nets
    times = clock.of("plan", "apply")
    row = _timed(f"chain of {layers:,}", f"{layers:,} x {width} filters", times, plan)
    row["case"] += f", {plan.before.parameters:.2e} parameters"
    parts = {f"{part}_ms": clock.of(part).median_ms for part in ("trace", "plan", "apply")}
    return {**row, **parts, "peak_over_both_networks": memory, **_budget(model, inputs, clock)}


def _warm() -> tuple[nn.Module, psap.Plan]:
    """A small network and its plan: what is loaded at first use is no memory of a network."""
    model, inputs = chain(2, 8, 1)
    return model, psap.plan(psap.trace(model, inputs), ratio=0.5)


def _budget(model: nn.Module, inputs: tuple[Any, ...], clock: Clock) -> Row:
    """A search for widths under a budget, with random sparsity ratios."""
    cost = CostModel(psap.trace(model, inputs))
    count = len(cost.sizes)
    sparsity = np.random.default_rng(0).uniform(0, 1, count)
    bounds = schedule.limits(cost.sizes.tolist(), 1.0, 1, 1)
    budget = Budget(cost, psap.Target(macs=0.5))
    for _ in range(4):
        clock(
            "budget",
            lambda: schedule.solve(sparsity, np.ones(count), 2.0, bounds, budget.fits, budget.room),
        )
    return {"groups": count, "budget_search_ms": clock.of("budget").median_ms}


def _alone(layers: int, width: int, kernel: int, repeats: int) -> Row:
    """`deep` in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(deep, (layers, width, kernel, repeats))


def run(
    *,
    models: tuple[str, ...] = NAMES,
    peers: Path | None = None,
    size: int = 0,
    repeats: int = 5,
    layers: tuple[int, ...] = LAYERS,
    large: bool = False,
    out: Path = rows.RESULTS,
) -> None:
    """Prune half of every layer, in turn with Torch-Pruning, and write a row for each network.

    Args:
        models: names in torchvision; with nothing behind ``--models``, none.
        peers: a folder that holds torch-pruning 1.6.1.
        size: edge of the images; 0 for what each model is made for.
        repeats: timed turns.
        layers: depths of the synthetic chains.
        large: a network of 1e9 parameters, too; needs 8 GB.
        out: folder of the rows.

    Raises:
        ValueError: too few repeats.
        CheckFailed: a small network is not the masked one.
    """
    if repeats < 2:
        raise ValueError(f"repeats is {repeats}; pass at least 2")
    if peers is not None:
        sys.path.insert(0, str(peers.resolve()))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if models:
            coverage.need("torchvision", "run it in the environment that `make zoo` sets up")
            coverage.need(
                "torch_pruning", "pip install --no-deps --target DIR torch-pruning, --peers DIR"
            )
        for name in models:
            rows.write("surgery", compared(name, size, repeats), out)
        for depth in layers:
            rows.write("surgery", _alone(depth, WIDTH, 3, min(repeats, 3)), out)
        if large:
            rows.write("surgery", _alone(*LARGE, 1, min(repeats, 3)), out)
    finally:
        torch.set_num_threads(before)
