"""What a unit of cost is worth in each channel group (docs/method.md, section 2, equation 4).

At the best widths under a budget, every group gains the same from one more unit of cost. The gate
derivatives of pruned channels measure that gain; a group where it is high keeps more at the next
prune step.
"""

from __future__ import annotations

import numpy as np

from psap.config import Config, Target
from psap.cost import KINDS, CostModel
from psap.gates import Bools, Floats
from psap.graph import Graph
from psap.lineage import Lineage
from psap.protect import Window

FLOOR = 1e-3
"""A price is at least this share of the mean: a group of no use must not divide by zero."""


def prices(graph: Graph, cost: CostModel, target: Target, alive: Bools, value: Floats) -> Floats:
    """Mean usefulness of a group's pruned channels, per share of the dense cost of one channel.

    Args:
        graph: the channel graph.
        cost: its cost model.
        target: says which costs are bounded; the shares of several are added.
        alive: bool [channels], kept channels.
        value: float64 [channels], the loss that opening a channel's gate saves; negative
            usefulness counts as none.

    Returns:
        float64 [groups]; NaN where nothing is pruned.
    """
    groups, pruned = len(graph.groups), ~alive
    widths = np.bincount(graph.group_of[alive], minlength=groups)
    bounded = [getattr(target, kind) is not None for kind in KINDS]
    shares = cost.changes(widths, widths + 1) / np.maximum(1e-9, cost.totals(cost.sizes))[:, None]
    share = np.maximum(shares[bounded].sum(axis=0), 1e-12)
    count = np.bincount(graph.group_of[pruned], minlength=groups)
    useful = np.bincount(graph.group_of[pruned], np.maximum(value[pruned], 0), groups)
    return np.where(count > 0, useful / np.maximum(1, count) / share, np.nan)


def adjust(factors: Floats, price: Floats, power: float, limit: float) -> Floats:
    """Factors on the kept widths, times ``(price / geometric mean) ** power``.

    Args:
        factors: float64 [groups], so far.
        price: float64 [groups]; NaN leaves a factor as it is, and so do prices without contrast.
        power: how strongly prices act.
        limit: factors stay within ``[1 / limit, limit]``.
    """
    known = np.isfinite(price)
    if not known.any() or not price[known].max() > 0:
        return factors
    log = np.log(np.maximum(price[known], FLOOR * price[known].mean()))
    result = factors.copy()
    result[known] *= np.exp(power * (log - log.mean()))
    clipped: Floats = np.clip(result, 1 / limit, limit)
    return clipped


def adjusted(
    lineage: Lineage, window: Window, alive: Bools, factors: Floats, config: Config
) -> tuple[Floats, Floats]:
    """Prices after a window, and the factors for the next prune step, float64 [groups] each."""
    value, _ = window.significance()
    price = prices(lineage.graph, lineage.cost, config.target, alive, value)
    return price, adjust(factors, price, config.price_power, config.price_limit)
