"""What a `Pruner` may prune: everything that provably goes, or what every module can lose."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from psap import plans, selection
from psap.config import Config
from psap.errors import PsapWarning, VerificationError
from psap.graph import Graph, trace
from psap.latency import LatencyTable
from psap.lineage import Lineage
from psap.pruner_state import check_training
from psap.shrink import apply

NEARLY_HALF = 0.4925
"""Of most sizes one channel less than half goes: odd widths, which a forward() may not expect."""


def prunable(
    model: nn.Module,
    example_inputs: Any,
    config: Config,
    latency: LatencyTable | None,
    optimizer: torch.optim.Optimizer,
    friends: Sequence[Any],
) -> Lineage:
    """Trace a model for a `Pruner`, and prove that it can be shrunk.

    All channels are taken, also those that a norm counts or that must be cut off where they are
    read: the small network may hold programs in the place of modules. If that fails, with
    ``gated``, and with ``progressive``, whose cuts are many and in place, only those are taken that
    every module can lose while it stays what it is.

    Raises:
        PsapError: as `Pruner` says.

    Warns:
        PsapWarning: layers are pruned that nothing trains, or fewer layers than could be traced.
    """
    gated = config.gated or config.progressive
    found = _lineage(trace(model, example_inputs, gated=gated), config, latency)
    check_training(optimizer, friends, found.graph)
    if not config.verify:
        return found
    try:
        _prove(found.graph)
        return found
    except VerificationError as error:
        less = found.graph if gated else trace(model, example_inputs, gated=True)
        if len(less.left_alone) <= len(found.graph.left_alone):
            raise
        reason = str(error)
    found = _lineage(less, config, latency)
    _prove(less)
    warnings.warn(
        f"{len(found.graph.groups)} channel groups are pruned, and not those that norms count or "
        f"that must be cut off where they are read, because the small network would fail: {reason}",
        PsapWarning,
        stacklevel=4,
    )
    return found


def _lineage(graph: Graph, config: Config, latency: LatencyTable | None) -> Lineage:
    lineage = Lineage(graph, latency)
    selection.require_target(graph, lineage.cost, config)
    return lineage


def _prove(graph: Graph) -> None:
    apply(graph.model, plans.plan(graph, ratio=NEARLY_HALF))
