"""What a network costs as a function of the widths of its channel groups.

Every dimension of a parameter is a fixed part plus a multiple of group widths; a parameter is the
product of its dimensions; a layer costs its output positions times the elements of its weight. So
MACs, parameters and activations of any widths are exact sums of products, without building the
network. What one group alone changes is a sum over the products that it occurs in, so all groups
together take one pass over all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from psap.config import Target
from psap.graph import Graph

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
KINDS = ("macs", "parameters", "activations")
"""What is counted; the fields of `Cost`, and bounds of a `psap.Target`."""


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
    """

    macs: int
    parameters: int
    activations: int | None = None


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
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        names = [name for name, _ in graph.model.named_parameters()]
        count, known = len(names), set(names)
        names += [n for n in dict.fromkeys(c.weight for c in graph.calls) if n not in known]
        row = {name: i for i, name in enumerate(names)}
        rank = max(1, max(len(graph.shapes[name]) for name in names))
        # A product is a column: its dimensions; first all parameters, then what layers give out.
        base = np.ones((rank, 2 * len(names)))
        gives = np.full(len(names), -1)
        for name, i in row.items():
            shape = graph.shapes[name]
            base[: len(shape), i] = shape
            dims = [d for d in range(len(shape)) if graph.roles.get((name, d)) == "out"]
            if dims:
                gives[i] = dims[0]
                base[0, len(names) + i] = shape[dims[0]]
        entries = []
        for number, group in enumerate(graph.groups):
            for (name, dim), times in group.sides.items():
                if name in row:
                    i = row[name]
                    entries.append((dim, i, number, times))
                    if dim == gives[i]:
                        entries.append((0, len(names) + i, number, times))
        self._products(base, np.array(entries, dtype=np.int64).reshape(-1, 4), graph)
        self._prices = np.zeros((len(KINDS), 2 * len(names)))
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
        self.dense = self.cost(self.sizes)

    def _products(self, base: Floats, entries: Ints, graph: Graph) -> None:
        """Keep the fixed part of every dimension, and where groups are in which product."""
        sizes = np.array([group.size for group in graph.groups], dtype=np.int64)
        axes, columns, groups, times = entries.T
        self._at = axes * base.shape[1] + columns
        self._groups, self._times = groups, times.astype(np.float64)
        np.subtract.at(base.reshape(-1), self._at, self._times * sizes[groups])
        self._base = base
        keys = groups * base.shape[1] + columns
        pairs, where = np.unique(keys, return_inverse=True)
        self._pair_group, self._pair_column = pairs // base.shape[1], pairs % base.shape[1]
        self._slopes = np.zeros((base.shape[0], pairs.size))
        np.add.at(self._slopes, (axes, where), self._times)

    def _dims(self, widths: ArrayLike) -> Floats:
        """Every dimension of every product, [rank, products]."""
        moving = self._times * np.asarray(widths, dtype=np.float64)[self._groups]
        added = np.bincount(self._at, moving, minlength=self._base.size)
        dims: Floats = self._base + added.reshape(self._base.shape)
        return dims

    def totals(self, widths: ArrayLike) -> Floats:
        """Cost at ``widths``, int [groups], in the order of `KINDS`."""
        found: Floats = self._prices @ self._dims(widths).prod(axis=0) + self._fixed
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
        added = (dims + self._slopes * step[self._pair_group]).prod(axis=0) - dims.prod(axis=0)
        prices = self._prices[:, self._pair_column]
        count = len(self.sizes)
        return np.stack([np.bincount(self._pair_group, p * added, count) for p in prices])

    def cost(self, widths: ArrayLike) -> Cost:
        """Cost at ``widths``, int [groups]."""
        macs, parameters, activations = (round(total) for total in self.totals(widths).tolist())
        return Cost(macs, parameters, activations)

    def layers(self, widths: ArrayLike) -> list[LayerCost]:
        """Shape and MACs of every weight that costs MACs, in the order of the model."""
        dims = self._dims(widths)
        costs = []
        for i, (name, price) in enumerate(zip(self._names, self._prices[0].tolist(), strict=False)):
            if price:
                shape = tuple(int(d) for d in dims[: len(self._graph.shapes[name]), i].tolist())
                costs.append(LayerCost(name, shape, round(price * float(np.prod(shape)))))
        return costs

    def fits(self, widths: ArrayLike, target: Target) -> bool:
        """Whether the widths keep every bound of a target (shares of the dense network)."""
        return Budget(self, target).fits(widths)


class Budget:
    """The bounds of a target, for `psap.schedule.solve`.

    Args:
        cost: the cost model.
        target: bounds as shares of the dense network.
    """

    def __init__(self, cost: CostModel, target: Target) -> None:
        self._cost = cost
        dense = cost.totals(cost.sizes)
        shares = [getattr(target, kind) for kind in KINDS]
        bounds = [np.inf if s is None else s * round(d) for s, d in zip(shares, dense, strict=True)]
        self._most = np.array(bounds)

    def fits(self, widths: ArrayLike) -> bool:
        """Whether the widths, int [groups], keep every bound."""
        return bool((np.round(self._cost.totals(widths)) <= self._most).all())

    def room(self, widths: Ints, wider: Ints) -> Bools:
        """For every group whether its wider width alone keeps every bound, bool [groups]."""
        totals = self._cost.totals(widths)[:, None] + self._cost.changes(widths, wider)
        found: Bools = np.all(np.round(totals) <= self._most[:, None], axis=0)
        return found
