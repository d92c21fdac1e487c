"""How a target can be met: widths by weight sparsity, and errors that say what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from psap import schedule, scores
from psap.config import Config, Target
from psap.cost import KINDS, Budget, CostModel
from psap.errors import TargetError
from psap.graph import Graph


def nothing_to_prune(graph: Graph) -> TargetError:
    """The error for a graph without groups."""
    reasons = [f"{name}: {why}" for name, why in list(graph.left_alone.items())[:5]]
    mend = f"; {_UNFREEZE}" if _frozen(graph) else ""
    return TargetError("no layer of this model can be pruned: " + "; ".join(reasons) + mend)


_UNFREEZE = "call requires_grad_(True) on what may be pruned"


def _frozen(graph: Graph) -> list[str]:
    """Why layers stay that frozen parameters keep."""
    return [why for why in graph.left_alone.values() if "requires_grad is False" in why]


def _what_stays(graph: Graph) -> str:
    """How many layers cannot be pruned, as the end of a sentence, and what mends it."""
    frozen = _frozen(graph)
    if frozen:
        return f"; {_count(frozen)} because {frozen[0]}, for one: {_UNFREEZE}"
    rest = [(n, why) for n, why in graph.left_alone.items() if why != "output of the model"]
    return f"; {_count(rest)}, {rest[0][0]} for one ({rest[0][1]})" if rest else ""


def _count(layers: Sequence[Any]) -> str:
    return "1 layer stays" if len(layers) == 1 else f"{len(layers)} layers stay"


def solve_target(
    graph: Graph,
    cost: CostModel,
    stats: Sequence[scores.GroupStats],
    bounds: Sequence[schedule.Limits],
    target: Target,
) -> schedule.Ints:
    """Widths by weight sparsity that meet a target.

    Raises:
        TargetError: even the smallest widths cost more.
    """
    sparsity = np.array([s.sparsity for s in stats])
    spared = scores.summands(graph) ** -Config.stream_power
    budget, power = Budget(cost, target), Config.sparsity_power
    widths = schedule.solve(sparsity, spared, power, bounds, budget.fits, budget.room)
    require(graph, cost, widths, target)
    return widths


def require(graph: Graph, cost: CostModel, widths: schedule.Ints, target: Target) -> None:
    """Check that widths meet a target.

    Raises:
        TargetError: they do not.
    """
    if cost.fits(widths, target):
        return
    shares = cost.totals(widths) / np.maximum(cost.totals(cost.sizes), 1e-300)
    names = ("MACs", "parameters", "activations", "predicted latency")
    wanted = [share is not None for share in (getattr(target, kind) for kind in KINDS)]
    kept = [
        f"{share:.1%} of the {name}"
        for at, (name, share) in enumerate(zip(names, shares.tolist(), strict=True))
        if at < 2 or wanted[at]
    ]
    bounds = ", ".join(f"{kind}={x}" for kind, x in vars(target).items() if x is not None)
    raise TargetError(
        f"Target({bounds}) cannot be met: the smallest network that these limits allow keeps "
        f"{', '.join(kept[:-1])} and {kept[-1]}; raise the target, or lower min_channels or "
        f"floors, or raise max_ratio{_what_stays(graph)}"
    )
