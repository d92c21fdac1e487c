"""Which channels a prune step keeps: widths under the budget, then the strongest of each group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from psap import choices, schedule, scores, targets
from psap.config import Config, Target
from psap.cost import Budget, CostModel
from psap.gates import Bools, Floats
from psap.graph import Graph

_STICKY = 1e6
"""Taken off the score of a pruned channel: it stays pruned unless supervision restored it."""


def require_target(graph: Graph, cost: CostModel, config: Config) -> None:
    """Check that the smallest network that the limits allow meets the target.

    Raises:
        TargetError: it does not, or nothing can be pruned.
    """
    if not graph.groups:
        raise targets.nothing_to_prune(graph)
    floors = np.array([b.nearest(b.floor) for b in bounds(graph, config)])
    targets.require(graph, cost, floors, config.target)


def bounds(graph: Graph, config: Config) -> list[schedule.Limits]:
    """The limits of every group of a dense network.

    Raises:
        ArgumentError: a floor names no layer of the model.
    """
    return schedule.limits(
        [g.size for g in graph.groups],
        config.max_ratio,
        config.min_channels,
        config.round_to,
        choices.floors(graph, config.floors),
    )


def measure(graph: Graph, weights: Mapping[str, Tensor], config: Config) -> list[scores.GroupStats]:
    """Statistics of every group, as `psap.scores.measure` with what the configuration says."""
    quantile = config.sparsity_quantile if config.threshold == "quantile" else None
    return scores.measure(graph, weights, config.sparsity_alpha, config.score, quantile)


def widths(
    graph: Graph,
    cost: CostModel,
    limits: Sequence[schedule.Limits],
    sparsity: Floats,
    factors: Floats,
    target: Target,
    config: Config,
) -> schedule.Ints:
    """The width of every group that just keeps the budget (docs/method.md, equation 3).

    Args:
        graph: the channel graph.
        cost: the cost model of the dense network.
        limits: the limits of every group.
        sparsity: float64 [groups], weight sparsity ratios.
        factors: float64 [groups], on what is kept.
        target: the budget.
        config: how sparsity becomes a ratio.
    """
    on_ratio = scores.summands(graph) ** -config.stream_power
    ratios = sparsity if config.adapt == "sparsity" else np.ones_like(sparsity)
    budget = Budget(cost, target)
    power = config.sparsity_power
    return schedule.solve(ratios, on_ratio, power, limits, budget.fits, budget.room, factors)


def strongest(
    graph: Graph,
    stats: Sequence[scores.GroupStats],
    widths: schedule.Ints,
    alive: Bools,
    bonus: Floats,
    config: Config,
) -> Bools:
    """Bool [channels], the new masks: the best of every group by score and bonus."""
    chosen = np.zeros_like(alive)
    for group, entry, width in zip(graph.groups, stats, widths, strict=True):
        span = slice(group.start, group.start + group.size)
        score = scores.importance(entry, config.score)
        score = score / max(float(score.mean()), 1e-300) + bonus[span]
        score = np.where(alive[span], score, score - _STICKY)
        chosen[group.start + np.array(scores.strongest(score, int(width)))] = True
    return chosen
