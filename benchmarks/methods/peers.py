"""Torch-Pruning through its own interface; an optional package (pip install torch-pruning)."""

from __future__ import annotations

import copy
import importlib
from typing import Any, Literal

from torch import nn

import psap
from benchmarks.methods.oneshot import DEFAULTS
from benchmarks.methods.task import Method, Task, at
from psap.cost import CostModel
from psap.errors import PsapError


def macs(model: nn.Module, example: Any) -> int:
    """MACs by the cost model that all methods are held to."""
    return CostModel(psap.trace(model, example)).dense.macs


def unsafe(model: nn.Module) -> list[nn.Module]:
    """Layers that it must leave alone: the classifier, and whatever feeds a padded shortcut.

    It crashes where a shortcut pads channels by numbers fixed in Python.
    """
    layers: list[nn.Module] = [m for m in model.modules() if isinstance(m, nn.Linear)]
    padded = [m for m in model.modules() if hasattr(m, "pad") and hasattr(m, "conv2")]
    return [*layers, model.conv1, *(block.conv2 for block in padded)] if padded else layers


class TorchPruning(Method):
    """Its pruner and importance; the ratio, the same in every layer, is found by bisection.

    Args:
        importance: "magnitude" with its `MagnitudePruner`, "group-norm" with its `GroupNormPruner`,
            whose regulariser works in the first half of the pruning phase; then it prunes.
        times: prune steps, spread as psap's are.
    """

    def __init__(self, importance: Literal["magnitude", "group-norm"], *, times: int = 1) -> None:
        try:
            self.tp = importlib.import_module("torch_pruning")
        except ImportError as error:
            raise PsapError(
                "torch-pruning is missing; pip install torch-pruning==1.6.1, or name the folder "
                "that holds it with --peers"
            ) from error
        self.importance, self.times = importance, times

    def begin(self, task: Task) -> None:
        """Finds the ratio, and when to prune."""
        start, length = task.prune_from, task.prune_until - task.prune_from
        shares = [start + 0.9 * length * i / max(1, self.times - 1) for i in range(self.times)]
        self.when = [at(task, s) for s in shares]
        if self.importance == "group-norm":
            self.when = [at(task, start + length / 2)]
        self.pruner = self.made(task, task.model, self.ratio(task))
        self.stepped(task, 0)

    def gradients(self, task: Task) -> None:
        """The regulariser of its `GroupNormPruner`."""
        if self.importance == "group-norm" and self.when:
            self.pruner.regularize(task.model)

    def stepped(self, task: Task, step: int) -> None:
        """Prunes when its time has come."""
        while self.when and self.when[0] == step:
            self.when.pop(0)
            self.pruner.step()
            task.optimizer = task.make_optimizer(task.model)

    def made(self, task: Task, model: nn.Module, ratio: float) -> Any:
        """Its pruner for a model."""
        kind, score = {
            "magnitude": (self.tp.pruner.MagnitudePruner, self.tp.importance.MagnitudeImportance),
            "group-norm": (
                self.tp.pruner.GroupNormPruner,
                self.tp.importance.GroupMagnitudeImportance,
            ),
        }[self.importance]
        return kind(
            model,
            task.example,
            importance=score(p=2),
            pruning_ratio=ratio,
            max_pruning_ratio=DEFAULTS.max_ratio,
            iterative_steps=self.times,
            ignored_layers=unsafe(model),
        )

    def ratio(self, task: Task) -> float:
        """The smallest ratio whose network is within the budget, on copies."""
        budget = task.keep * macs(task.model, task.example)
        low, high, found = 0.0, DEFAULTS.max_ratio, None
        for _ in range(12):
            middle = (low + high) / 2
            model = copy.deepcopy(task.model)
            pruner = self.made(task, model, middle)
            for _ in range(self.times):
                pruner.step()
            if macs(model, task.example) <= budget:
                high = found = middle
            else:
                low = middle
        if found is None:
            raise PsapError(f"torch-pruning cannot reach {task.keep:.0%} of the MACs here")
        return found
