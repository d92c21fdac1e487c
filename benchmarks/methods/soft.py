"""Soft filter pruning: filters are zeroed at every prune step and may grow back in between."""

from __future__ import annotations

import numpy as np
import torch

import psap
from benchmarks.methods.oneshot import DEFAULTS, norms, shrink, sized, strongest, uniform
from benchmarks.methods.task import Method, Task, at
from psap import schedule, scores


class SoftFilters(Method):
    """SFP (He et al., 2018) and, with a growing ratio, ASFP (He et al., 2019).

    Zeroes the rows of convolutions, as published: batch norms stay.

    Args:
        asymptotic: the ratio grows from 0 to its end over the pruning phase.
        times: how often filters are zeroed.
    """

    def __init__(self, *, asymptotic: bool = False, times: int = 5) -> None:
        self.asymptotic, self.times = asymptotic, times

    def begin(self, task: Task) -> None:
        """Spreads the prune steps over the pruning phase."""
        self.graph = psap.trace(task.model, task.example)
        shares = np.linspace(task.prune_from, task.prune_until, self.times + 1)[1:]
        self.when = [at(task, s) for s in shares]

    def share(self, task: Task, time: int) -> float:
        """The share that is kept at prune step ``time``, from 1."""
        progress = time / self.times if self.asymptotic else 1.0
        return 1 - (1 - task.keep) * progress

    def choose(self, task: Task, keep: float) -> list[list[int]]:
        """The filters that stay."""
        return uniform(self.graph, norms(self.graph, task), keep)

    def stepped(self, task: Task, step: int) -> None:
        """Zeroes the weakest filters; at the last time, removes them."""
        if step not in self.when:
            return
        kept = self.choose(task, self.share(task, self.when.index(step) + 1))
        if step == self.when[-1]:
            shrink(task, self.graph, kept)
        else:
            self.zero(kept)

    @torch.no_grad()
    def zero(self, kept: list[list[int]]) -> None:
        """Zero the filters that are not kept."""
        tensors = dict(self.graph.model.named_parameters())
        for group, indices in zip(self.graph.groups, kept, strict=True):
            stays = np.zeros(group.size, dtype=bool)
            stays[indices] = True
            for name in group.producers:
                channels = self.graph.channels[name, 0] - group.start
                inside = (channels >= 0) & (channels < group.size)
                gone = inside & ~stays[np.clip(channels, 0, group.size - 1)]
                tensors[name][torch.from_numpy(gone).to(tensors[name].device)] = 0


class AdaptiveFilters(SoftFilters):
    """psap's ratios and schedule with SFP's zeroing in the place of its gate."""

    def begin(self, task: Task) -> None:
        """Nothing is measured yet."""
        super().begin(task)
        self.sparsity: scores.Floats | None = None

    def share(self, task: Task, time: int) -> float:
        """As psap's schedule has it."""
        return schedule.kept_share(time, self.times, task.keep, DEFAULTS.schedule)

    def choose(self, task: Task, keep: float) -> list[list[int]]:
        """Widths by the moving average of the sparsity of each group."""
        tensors = dict(self.graph.model.named_parameters())
        stats = scores.measure(self.graph, tensors, DEFAULTS.sparsity_alpha)
        now, ema = np.array([s.sparsity for s in stats]), DEFAULTS.sparsity_ema
        mean = now if self.sparsity is None else ema * self.sparsity + (1 - ema) * now
        self.sparsity = mean
        return strongest(norms(self.graph, task), sized(self.graph, mean, keep))
