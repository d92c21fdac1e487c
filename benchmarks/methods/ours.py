"""psap's Pruner, its default and its ablations."""

from __future__ import annotations

from typing import Any

import numpy as np

import psap
from benchmarks.methods.task import Method, Task, at


class Psap(Method):
    """A `psap.Pruner` whose prune steps are spread evenly over the pruning phase.

    Args:
        spend: share of the pruning phase over which the steps are spread.
        late: the network stays masked to the end, instead of being shrunk when masks are final.
        options: of `psap.Config`.
    """

    def __init__(self, *, spend: float = 0.9, late: bool = False, **options: Any) -> None:
        self.spend, self.late, self.options = spend, late, options

    def begin(self, task: Task) -> None:
        """Makes the pruner."""
        config = psap.Config(target=psap.Target(macs=task.keep), **self.options)
        self.pruner: psap.Pruner | None = psap.Pruner(
            task.model, task.example, optimizer=task.optimizer, config=config
        )
        length = (task.prune_until - task.prune_from) * self.spend
        shares = task.prune_from + length * np.linspace(0, 1, config.prune_steps)
        self.when = [max(1, at(task, s)) for s in shares]

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
        task.model, task.optimizer = result.model, result.optimizer
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
