"""What a network costs as a function of the widths of its channel groups.

Every dimension of a parameter is a fixed part plus a multiple of group widths; a parameter is the
product of its dimensions; a layer costs its output positions times the elements of its weight. So
MACs, parameters and activations of any widths are exact sums of products, without building the
network. What one group alone changes is a sum over the products that it occurs in, so all groups
together take one pass over all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from psap.config import Target
from psap.errors import ArgumentError
from psap.graph import Graph
from psap.members import named_tensors

if TYPE_CHECKING:
    from psap.latency import LatencyTable

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
KINDS = ("macs", "parameters", "activations", "latency")
"""What is counted, and bounds of a `psap.Target`; latency in milliseconds, 0 without a table."""


@dataclass(frozen=True)
class Cost:
    """Cost of one network.

    Attributes:
        macs: multiply-accumulates of convolutions and matrix products for one input (1 MAC = 2
            FLOPs); biases, normalisation and activations are not counted.
        parameters: number of elements of all parameters.
        activations: number of elements that convolutions and linear layers give out for one input
            (Radosavovic et al., arXiv 2003.13678); None in plans that were written before it was
            counted. Times the bytes of an element, the activation memory of these layers.
        latency_ms: predicted time of one pass with the batch that was traced, if there is a table.
    """

    macs: int
    parameters: int
    activations: int | None = None
    latency_ms: float | None = None


@dataclass(frozen=True)
class LayerCost:
    """Cost of one weight.

    Attributes:
        weight: name of the parameter.
        shape: its shape.
        macs: MACs per input of all calls that use it.
    """

    weight: str
    shape: tuple[int, ...]
    macs: int


class CostModel:
    """Exact cost of a traced model for any group widths.

    Args:
        graph: the channel graph.
        latency: what `psap.measure_latency` returned for it.

    Raises:
        ArgumentError: the table does not cover the model.
    """

    def __init__(self, graph: Graph, latency: LatencyTable | None = None) -> None:
        self._graph = graph
        names = list(named_tensors(graph.model)[0])
        count, known = len(names), set(names)
        names += [n for n in dict.fromkeys(c.weight for c in graph.calls) if n not in known]
        row = {name: i for i, name in enumerate(names)}
        rank = max(1, max(len(graph.shapes[name]) for name in names))
        gives = self._products(graph, row, rank)
        self._prices = np.zeros((len(KINDS) - 1, 2 * len(names) + 1))
        self._prices[0, -1] = 1 / graph.batch
        self._prices[1, :count] = 1
        for call in graph.calls:
            i = row[call.weight]
            self._prices[0, i] += call.positions / graph.batch
            if gives[i] >= 0:
                size = graph.shapes[call.weight][gives[i]]
                self._prices[2, len(names) + i] += call.outputs / graph.batch / max(1, size)
        self._fixed = np.array([graph.fixed_macs / graph.batch, 0.0, 0.0])
        self._names = names
        self.sizes = np.array([group.size for group in graph.groups], dtype=np.int64)
        self._times = None if latency is None else latency.times(graph, row)
        if self._times is not None:
            # Every pair of a group and a layer that it makes narrower.
            order = np.argsort(self._times.rows, kind="stable")
            ends = [np.searchsorted(self._times.rows[order], self._pair_column, side)
                    for side in ("left", "right")]  # fmt: skip
            count_of = ends[1] - ends[0]
            self._pair = np.repeat(np.arange(count_of.size), count_of)
            within = np.arange(self._pair.size) - np.repeat(
                np.cumsum(count_of) - count_of, count_of
            )
            self._layer = order[np.repeat(ends[0], count_of) + within]
        self._full = float(self._counts(self._dims(self.sizes))[2])
        self.dense = self.cost(self.sizes)

    def _products(self, graph: Graph, row: Mapping[str, int], rank: int) -> Ints:
        """Keep the fixed part of every dimension, and where groups are in which product.

        A product is a column of dimensions: first all parameters, then what layers give out, and
        last the products of activations whose channels go, as one number.

        Returns:
            For every parameter the dimension along which it gives channels, or -1.
        """
        count = len(row)
        base, gives = np.ones((rank, 2 * count + 1)), np.full(count, -1)
        for name, i in row.items():
            shape = graph.shapes[name]
            base[: len(shape), i] = shape
            dims = [d for d in range(len(shape)) if graph.roles.get((name, d)) in ("out", "state")]
            if dims:
                gives[i] = dims[0]
                base[0, count + i] = shape[dims[0]]
        base[0, -1] = sum(macs * graph.groups[n].size for n, macs in graph.products.items())
        entries = [(0, 2 * count, n, macs) for n, macs in graph.products.items()]
        for number, group in enumerate(graph.groups):
            for (name, dim), times in group.sides.items():
                if name in row:
                    entries.append((dim, row[name], number, times))
                    if dim == gives[row[name]]:
                        entries.append((0, count + row[name], number, times))
        self._keep(base, np.array(entries, dtype=np.float64).reshape(-1, 4), graph)
        return gives

    def _keep(self, base: Floats, entries: Floats, graph: Graph) -> None:
        sizes = np.array([group.size for group in graph.groups], dtype=np.int64)
        axes, columns, groups = entries[:, :3].astype(np.int64).T
        self._at = axes * base.shape[1] + columns
        self._groups, self._factors = groups, entries[:, 3]
        np.subtract.at(base.reshape(-1), self._at, self._factors * sizes[groups])
        self._base = base
        keys = groups * base.shape[1] + columns
        pairs, where = np.unique(keys, return_inverse=True)
        self._pair_group, self._pair_column = pairs // base.shape[1], pairs % base.shape[1]
        self._slopes = np.zeros((base.shape[0], pairs.size))
        np.add.at(self._slopes, (axes, where), self._factors)

    def _dims(self, widths: ArrayLike) -> Floats:
        """Every dimension of every product, [rank, products]."""
        moving = self._factors * np.asarray(widths, dtype=np.float64)[self._groups]
        added = np.bincount(self._at, moving, minlength=self._base.size)
        dims: Floats = self._base + added.reshape(self._base.shape)
        return dims

    def totals(self, widths: ArrayLike) -> Floats:
        """Cost at ``widths``, int [groups], in the order of `KINDS`."""
        dims = self._dims(widths)
        counts = self._counts(dims)
        if self._times is None:
            return np.append(counts, 0.0)
        times = self._times
        layers = times.of(np.arange(len(times.rows)), dims[:, times.rows]).sum()
        return np.append(counts, layers + times.rest_ms * counts[2] / max(1.0, self._full))

    def _counts(self, dims: Floats) -> Floats:
        found: Floats = self._prices @ dims.prod(axis=0) + self._fixed
        return found

    def changes(self, widths: ArrayLike, others: ArrayLike) -> Floats:
        """What it adds if one group alone takes its other width.

        Args:
            widths: int [groups].
            others: int [groups].

        Returns:
            float64 [kinds, groups].
        """
        dims = self._dims(widths)[:, self._pair_column]
        step = np.asarray(others, dtype=np.float64) - np.asarray(widths, dtype=np.float64)
        wider = dims + self._slopes * step[self._pair_group]
        added = wider.prod(axis=0) - dims.prod(axis=0)
        prices = self._prices[:, self._pair_column]
        count = len(self.sizes)
        found = [np.bincount(self._pair_group, p * added, count) for p in prices]
        if self._times is None:
            return np.stack([*found, np.zeros(count)])
        times, pair, layer = self._times, self._pair, self._layer
        slower = times.of(layer, wider[:, pair]) - times.of(layer, dims[:, pair])
        rest = times.rest_ms * found[2] / max(1.0, self._full)
        return np.stack([*found, np.bincount(self._pair_group[pair], slower, count) + rest])

    def cost(self, widths: ArrayLike) -> Cost:
        """Cost at ``widths``, int [groups]."""
        *counts, milliseconds = self.totals(widths).tolist()
        macs, parameters, activations = (round(count) for count in counts)
        return Cost(macs, parameters, activations, milliseconds if self._times else None)

    def layers(self, widths: ArrayLike) -> list[LayerCost]:
        """Shape and MACs of every weight that costs MACs, in the order of the model."""
        dims = self._dims(widths).T.tolist()
        costs = []
        for name, price, sizes in zip(self._names, self._prices[0].tolist(), dims, strict=False):
            if price:
                shape = tuple(map(int, sizes[: len(self._graph.shapes[name])]))
                costs.append(LayerCost(name, shape, round(price * float(math.prod(shape)))))
        return costs

    def fits(self, widths: ArrayLike, target: Target) -> bool:
        """Whether the widths keep every bound of a target (shares of the dense network)."""
        return Budget(self, target).fits(widths)


class Budget:
    """The bounds of a target, for `psap.schedule.solve`.

    Args:
        cost: the cost model.
        target: bounds as shares of the dense network.

    Raises:
        ArgumentError: latency is bound, and the cost model has no table of it.
    """

    def __init__(self, cost: CostModel, target: Target) -> None:
        if target.latency is not None and cost.dense.latency_ms is None:
            raise ArgumentError(
                "Target(latency=...) needs times that were measured; pass "
                "latency=psap.measure_latency(graph, path)"
            )
        self._cost = cost
        dense = _rounded(cost.totals(cost.sizes))
        shares = [getattr(target, kind) for kind in KINDS]
        most = [np.inf if s is None else s * d for s, d in zip(shares, dense.tolist(), strict=True)]
        self._most = np.array(most)

    def fits(self, widths: ArrayLike) -> bool:
        """Whether the widths, int [groups], keep every bound."""
        return bool((_rounded(self._cost.totals(widths)) <= self._most).all())

    def room(self, widths: Ints, wider: Ints) -> Bools:
        """For every group whether its wider width alone keeps every bound, bool [groups]."""
        totals = self._cost.totals(widths)[:, None] + self._cost.changes(widths, wider)
        found: Bools = np.all(_rounded(totals) <= self._most[:, None], axis=0)
        return found


def _rounded(totals: Floats) -> Floats:
    """Counts are whole, and sums of them in another order must compare alike; times to a ns."""
    return np.concatenate([np.round(totals[:-1]), np.round(totals[-1:], 6)])
