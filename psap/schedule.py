"""From sparsity ratios to group widths under a budget: pure numbers (docs/method.md, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from psap.config import Schedule

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Fits = Callable[[Ints], bool]
Room = Callable[[Ints, Ints], Bools]


def kept_share(step: int, steps: int, target: float, schedule: Schedule) -> float:
    """F_t, the share that is kept after prune step ``step`` of ``steps`` (equation 2).

    Args:
        step: t, from 1 to ``steps``.
        steps: n.
        target: F, kept share at the end.
        schedule: "cubic" prunes most at first; "linear" the same at every step.

    Returns:
        A number from F to 1, exactly F at the last step.
    """
    if step >= steps:
        return target
    done = step / steps
    progress = 1 - (1 - done) ** 3 if schedule == "cubic" else done
    return 1 - (1 - target) * progress


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of the widths of one group.

    Attributes:
        size: C_g.
        floor: the smallest width allowed.
        quantum: widths are multiples of this, or the full size.
        most: the largest width that is left, C_g in the beginning.
    """

    size: int
    floor: int
    quantum: int
    most: int

    def nearest(self, width: float) -> int:
        """The allowed width that is nearest, or the next larger one at the floor."""
        steps = int(np.floor(width / self.quantum + 0.5))
        least = -(-self.floor // self.quantum)
        return min(self.most, max(steps, least) * self.quantum)

    def above(self, width: int) -> int:
        """The next larger allowed width."""
        return min(self.most, (width // self.quantum + 1) * self.quantum)

    def without(self, width: int) -> Limits:
        """The bounds when only ``width`` channels are left."""
        whole = width == self.size or width % self.quantum == 0
        return replace(self, most=width if whole else width // self.quantum * self.quantum)


def limits(
    sizes: Sequence[int],
    max_ratio: float,
    min_channels: int,
    round_to: int,
    floors: Floats | None = None,
) -> list[Limits]:
    """Bounds of every group: c_min, the largest ratio, the multiple, and kept shares [groups]."""
    bounds = []
    for at, size in enumerate(sizes):
        share = 1 - max_ratio if floors is None else max(1 - max_ratio, float(floors[at]))
        floor = max(1, min_channels, int(np.ceil(size * share - 1e-9)))
        bounds.append(
            Limits(size=size, floor=min(size, floor), quantum=min(size, round_to), most=size)
        )
    return bounds


class _Bounds:
    """The same of many groups, as arrays int64 [groups]."""

    def __init__(self, bounds: Sequence[Limits]) -> None:
        self.sizes = np.array([b.size for b in bounds], dtype=np.int64)
        self.most = np.array([b.most for b in bounds], dtype=np.int64)
        self.quanta = np.array([b.quantum for b in bounds], dtype=np.int64)
        self.least = -(-np.array([b.floor for b in bounds], dtype=np.int64) // self.quanta)

    def nearest(self, widths: Floats) -> Ints:
        """The allowed widths that are nearest."""
        steps = np.floor(widths / self.quanta + 0.5).astype(np.int64)
        found: Ints = np.minimum(self.most, np.maximum(steps, self.least) * self.quanta)
        return found

    def above(self, widths: Ints) -> Ints:
        """The next larger allowed widths."""
        found: Ints = np.minimum(self.most, (widths // self.quanta + 1) * self.quanta)
        return found


def solve(
    sparsity: Floats,
    factors: Floats,
    power: float,
    bounds: Sequence[Limits],
    fits: Fits,
    room: Room | None = None,
    gains: Floats | None = None,
) -> Ints:
    """The widths of equation (3): ratios ``kappa * factor * sparsity**power`` that just fit.

    The smallest kappa that fits is found by bisection; what rounding left over is then spent on
    single quanta, the least sparse group first.

    Args:
        sparsity: weight sparsity ratio per group, [groups] in [0, 1].
        factors: factor per group on its ratio, [groups].
        power: exponent of the sparsity ratio.
        bounds: bounds per group.
        fits: whether widths keep the budget; must not turn false when widths shrink.
        room: for every group whether its wider width alone keeps the budget; for many groups.
        gains: factor per group on what is kept, [groups]; none by default.

    Returns:
        Widths int64 [groups]. If even the floors do not fit, the floors.
    """
    limit = _Bounds(bounds)
    if not len(bounds) or fits(limit.most):
        return limit.most
    weight = np.nan_to_num(sparsity, nan=1.0) ** power
    if not weight.any() or np.ptp(weight) == 0:
        weight = np.ones_like(weight)
    weight = weight * factors
    gain = np.ones(len(bounds)) if gains is None else gains

    def widths(kappa: float) -> Ints:
        kept = np.minimum(1.0, gain * (1 - np.minimum(1.0, kappa * weight)))
        return limit.nearest(limit.sizes * kept)

    low, high, wide, found = 0.0, 1e4, limit.most, widths(1e4)
    for _ in range(60):
        middle = (low + high) / 2
        between = widths(middle)
        if np.array_equal(between, found) or (not np.array_equal(between, wide) and fits(between)):
            high, found = middle, between
        else:
            low, wide = middle, between
    if not fits(found):
        found = limit.nearest(np.zeros(len(bounds)))
        if not fits(found):
            return found
    return _fill(found, np.argsort(sparsity, kind="stable"), limit, fits, room)


def _fill(
    widths: Ints, order: NDArray[np.intp], limit: _Bounds, fits: Fits, room: Room | None
) -> Ints:
    """Spend what is left of the budget, one quantum at a time, least sparse group first.

    The groups that can go at once, because all of them fit together, are found by bisection; a
    group that does not fit once never will, since the others only grow.
    """
    widths, turn = widths.copy(), order
    while turn.size:
        waiting, served = turn, []
        while waiting.size:
            wider = limit.above(widths)
            possible = wider > widths
            if room is not None:
                possible &= room(widths, wider)
            waiting = waiting[possible[waiting]]
            count = _prefix(widths, wider, waiting, fits)
            widths[waiting[:count]] = wider[waiting[:count]]
            served.append(waiting[:count])
            waiting = waiting[count + 1 :]
        turn = np.concatenate(served) if served else order[:0]
    return widths


def _prefix(widths: Ints, wider: Ints, groups: NDArray[np.intp], fits: Fits) -> int:
    """How many of the groups can be widened together, from the first on."""

    def fit(count: int) -> bool:
        trial = widths.copy()
        trial[groups[:count]] = wider[groups[:count]]
        return fits(trial)

    some, step = 0, 1
    while some + step <= groups.size and fit(some + step):
        some += step
        step *= 2
    while step > 1:
        step //= 2
        if some + step <= groups.size and fit(some + step):
            some += step
    return some
