"""What a pruning method works on, and what the training loop asks of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import psap

Batch = tuple[Tensor, Tensor]


@dataclass(kw_only=True)
class Task:
    """One run: a network that trains, and what it shall become.

    Attributes:
        model: the network; a method puts the small one here.
        optimizer: its optimizer; a method puts that of the small one here.
        make_optimizer: makes a new one for a new network.
        example: a batch to trace with, [N, C, H, W].
        batches: training batches for what a method wants to measure; a new iterator each call.
        keep: kept share of the MACs.
        steps: optimizer steps of the whole run.
        prune_from: share of the run after which pruning may begin.
        prune_until: share of the run after which the network must be small.
        seed: of whatever a method draws.
        notes: what a method wants to tell; goes into the row.
        result: the small network with its recipe, if psap made it.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    example: Tensor
    batches: Callable[[], Iterator[Batch]]
    keep: float
    steps: int
    prune_from: float
    prune_until: float
    seed: int
    notes: dict[str, object] = field(default_factory=dict)
    result: psap.Result | None = None


class Method:
    """Base of all methods: does nothing."""

    def begin(self, task: Task) -> None:
        """Before the first step."""

    def gradients(self, task: Task) -> None:
        """Gradients are there, the optimizer has not stepped yet."""

    def stepped(self, task: Task, step: int) -> None:
        """Optimizer step number ``step`` (from 1) is done."""

    def finish(self, task: Task) -> None:
        """After the last step: the network must be small now."""


def at(task: Task, share: float) -> int:
    """The step at a share of the run."""
    return round(task.steps * share)
