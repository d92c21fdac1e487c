"""psap's Pruner, its default and its ablations."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import psap
from benchmarks.methods.task import Method, Task, at


class Psap(Method):
    """A `psap.Pruner` whose prune steps are spread evenly over the pruning phase.

    Args:
        spend: share of the pruning phase over which the steps are spread.
        late: the network stays masked to the end, instead of being shrunk when masks are final.
        blocks: at most so many residual branches go before the first step, as `psap.drop_blocks`
            chooses them.
        tolerance: how much they may raise the loss.
        options: of `psap.Config`.
    """

    def __init__(
        self,
        *,
        spend: float = 0.9,
        late: bool = False,
        blocks: int = 0,
        tolerance: float = 0.5,
        **options: Any,
    ) -> None:
        self.spend, self.late, self.options = spend, late, options
        self.blocks, self.tolerance = blocks, tolerance

    def begin(self, task: Task) -> None:
        """Drops blocks, and makes the pruner."""
        target = psap.Target(macs=task.keep)
        if self.blocks:
            target = self.shorten(task, target)
        config = psap.Config(target=target, **self.options)
        self.pruner: psap.Pruner | None = psap.Pruner(
            task.model, task.example, optimizer=task.optimizer, config=config
        )
        length = (task.prune_until - task.prune_from) * self.spend
        shares = task.prune_from + length * np.linspace(0, 1, config.prune_steps)
        self.when = [max(1, at(task, s)) for s in shares]

    def shorten(self, task: Task, target: psap.Target) -> psap.Target:
        """Drops blocks by the loss of eight batches; returns what is left of the target."""
        batches = list(islice(task.batches(), 8))

        @torch.inference_mode()
        def loss(model: nn.Module) -> float:
            return sum(float(F.cross_entropy(model(x), y)) for x, y in batches) / len(batches)

        result = psap.drop_blocks(
            task.model,
            task.example,
            evaluate=loss,
            tolerance=self.tolerance,
            most=self.blocks,
            optimizer=task.optimizer,
        )
        assert result.optimizer is not None
        task.model, task.optimizer = result.model, result.optimizer
        task.notes["dropped"] = [block.name for block in result.plan.dropped]
        return target.after(result)

    def stepped(self, task: Task, step: int) -> None:
        """Prunes; when the masks are final, shrinks."""
        if self.pruner is None:
            return
        for _ in range(self.when.count(step)):
            self.pruner.step()
        if self.pruner.done and not self.late:
            self.take(task, self.pruner)

    def finish(self, task: Task) -> None:
        """A run may end in the last window."""
        if self.pruner is not None:
            self.take(task, self.pruner)

    def take(self, task: Task, pruner: psap.Pruner) -> None:
        """Goes on with the small network."""
        result = pruner.finish()
        assert result.optimizer is not None
        task.model, task.optimizer, task.result = result.model, result.optimizer, result
        windows = [e for e in result.report["events"] if e["kind"] == "window"]
        back = {
            (c["group"], c["channel"])
            for event in windows
            for c in event["candidates"]
            if c["restored"]
        }
        kept = {group.name: set(group.kept) for group in result.plan.groups}
        task.notes["restored"] = len(back)
        task.notes["restored_and_kept"] = sum(c in kept.get(g, ()) for g, c in back)
        self.pruner = None
