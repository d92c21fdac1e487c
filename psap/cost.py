"""What a network costs as a function of the widths of its channel groups.

Every dimension of a parameter is a fixed part plus a multiple of group widths; a parameter is the
product of its dimensions; a layer costs its output positions times the elements of its weight. So
MACs and parameters of any widths are exact sums of products, without building the network.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from psap.config import Target
from psap.graph import Graph

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Cost:
    """Cost of one network.

    Attributes:
        macs: multiply-accumulates of convolutions and matrix products for one input (1 MAC = 2
            FLOPs); biases, normalisation and activations are not counted.
        parameters: number of elements of all parameters.
    """

    macs: int
    parameters: int


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
        parameters = [name for name, _ in graph.model.named_parameters()]
        self._count = len(parameters)
        called = dict.fromkeys(call.weight for call in graph.calls)
        parameters += [name for name in called if name not in set(parameters)]  # fixed filters
        row = {name: i for i, name in enumerate(parameters)}
        rank = max(1, max(len(graph.shapes[name]) for name in parameters))
        self._base = np.ones((len(parameters), rank))
        for name, i in row.items():
            self._base[i, : len(graph.shapes[name])] = graph.shapes[name]
        entries = []
        for number, group in enumerate(graph.groups):
            for (name, dim), count in group.sides.items():
                if name in row:
                    self._base[row[name], dim] -= count * group.size
                    entries.append((row[name], dim, number, count))
        self._entries = np.array(entries, dtype=np.int64).reshape(-1, 4)
        self._positions = np.zeros(len(parameters))
        for call in graph.calls:
            if call.weight in row:
                self._positions[row[call.weight]] += call.positions / graph.batch
        self._fixed = graph.fixed_macs / graph.batch
        self._names = parameters
        self.sizes = np.array([group.size for group in graph.groups], dtype=np.int64)
        self.dense = self.cost(self.sizes)

    def _dims(self, widths: ArrayLike) -> Floats:
        dims: Floats = self._base.copy()
        rows, axes, groups, counts = self._entries.T
        np.add.at(dims, (rows, axes), counts * np.asarray(widths, dtype=np.float64)[groups])
        return dims

    def cost(self, widths: ArrayLike) -> Cost:
        """Cost at ``widths``, int [groups]."""
        elements = self._dims(widths).prod(axis=1)
        macs = float(self._positions @ elements) + self._fixed
        return Cost(macs=round(macs), parameters=round(float(elements[: self._count].sum())))

    def layers(self, widths: ArrayLike) -> list[LayerCost]:
        """Shape and MACs of every weight that costs MACs, in the order of the model."""
        dims = self._dims(widths)
        costs = []
        for i, name in enumerate(self._names):
            if self._positions[i]:
                shape = tuple(int(d) for d in dims[i, : len(self._graph.shapes[name])])
                costs.append(
                    LayerCost(name, shape, round(self._positions[i] * float(np.prod(shape))))
                )
        return costs

    def fits(self, widths: ArrayLike, target: Target) -> bool:
        """Whether the widths keep every bound of a target (shares of the dense network)."""
        cost = self.cost(widths)
        within_macs = target.macs is None or cost.macs <= target.macs * self.dense.macs
        return within_macs and (
            target.parameters is None
            or cost.parameters <= target.parameters * self.dense.parameters
        )
