"""Filter statistics of the producers of every channel group: importance and weight sparsity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import psap_kernels
from psap.errors import PsapError
from psap.graph import MAKES, Graph, Group

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class GroupStats:
    """Statistics of the producers of one group.

    Attributes:
        power: float64 [producers, C_g], sum of w^2 (or of |w|) of the filters of each channel.
        sparse: weights below their layer's threshold, summed over the group.
        elements: weights of the group's filters.
    """

    power: Floats
    sparse: int
    elements: int

    @property
    def sparsity(self) -> float:
        """s_g, the weight sparsity ratio of the group (equation 1)."""
        return self.sparse / self.elements if self.elements else 0.0

    def __add__(self, other: GroupStats) -> GroupStats:
        return GroupStats(
            self.power + other.power, self.sparse + other.sparse, self.elements + other.elements
        )

    def __sub__(self, other: GroupStats) -> GroupStats:
        return GroupStats(
            self.power - other.power, self.sparse - other.sparse, self.elements - other.elements
        )

    def of(self, channels: NDArray[np.bool_]) -> GroupStats:
        """The same with the powers of some channels; bool [C_g]."""
        return replace(self, power=self.power[:, channels])


def _rows(
    graph: Graph, tensors: Mapping[str, Tensor], name: str
) -> tuple[Tensor, NDArray[np.int64]]:
    """A producer with its filters along dimension 0, and the channel of each filter."""
    dims = [d for d in range(tensors[name].dim()) if graph.roles.get((name, d)) in MAKES]
    dim = next(d for d in dims if (graph.channels[name, d] >= 0).any())
    return tensors[name].detach().movedim(dim, 0), graph.channels[name, dim]


@torch.no_grad()
def measure(
    graph: Graph,
    tensors: Mapping[str, Tensor],
    alpha: float | None,
    score: Literal["l1", "l2"] = "l2",
    quantile: float | None = None,
) -> list[GroupStats]:
    """Statistics of every group, from one pass over all weights, and one more for the threshold.

    Args:
        graph: the channel graph.
        tensors: the current parameters by name.
        alpha: a weight is sparse if ``|w| < alpha * std(layer)``; None counts no sparse weights.
        score: "l2" sums squares, "l1" absolute values.
        quantile: a weight is sparse if it is below this quantile of all weights instead, each in
            units of the standard deviation that He's initialisation gives its layer.

    Returns:
        One entry per group.

    Raises:
        PsapError: a weight is not finite.
    """
    names = list(dict.fromkeys(name for group in graph.groups for name in group.producers))
    if not names:
        return []
    weights, owners = zip(*(_rows(graph, tensors, name) for name in names), strict=True)
    first = stats = psap_kernels.layer_stats(weights)
    std = torch.nan_to_num(first.layer_std())
    _refuse_nonfinite(names, first)
    if quantile is not None:
        stats = psap_kernels.layer_stats(weights, tau=_common(weights, quantile, std))
    elif alpha is not None:
        stats = psap_kernels.layer_stats(weights, tau=(alpha * std).float())
    power = stats.weight_sq if score == "l2" else stats.weight_abs
    values, counts = power.double().cpu().numpy(), stats.below_tau.cpu().numpy()
    dead = (std == 0).cpu().numpy()
    row = {name: index for index, name in enumerate(names)}
    offsets, result = stats.offsets, []
    for group in graph.groups:
        rows = [row[name] for name in group.producers]
        result.append(_group(group, rows, weights, owners, offsets, values, counts, dead))
    return result


def _common(weights: Sequence[Tensor], quantile: float, like: Tensor) -> Tensor:
    """Thresholds float32 [layers]: one quantile of ``|w| / he`` over all layers, times each he."""
    fans = [max(1, weight[0].numel()) for weight in weights]
    he = like.new_tensor([(2 / fan) ** 0.5 for fan in fans], dtype=torch.float32)
    return he * psap_kernels.abs_quantile(weights, quantile, scales=1 / he)


def _group(
    group: Group,
    rows: list[int],
    weights: tuple[Tensor, ...],
    owners: tuple[NDArray[np.int64], ...],
    offsets: tuple[int, ...],
    values: Floats,
    counts: NDArray[np.int32],
    dead: NDArray[np.bool_],
) -> GroupStats:
    power = np.zeros((len(rows), group.size))
    sparse = elements = 0
    for at, row in enumerate(rows):
        local = owners[row] - group.start
        inside = (local >= 0) & (local < group.size)
        span = slice(offsets[row], offsets[row + 1])
        np.add.at(power[at], local[inside], values[span][inside])
        size = int(inside.sum()) * (weights[row].numel() // max(1, weights[row].shape[0]))
        elements += size
        if not dead[row]:
            sparse += int(counts[span][inside].sum())
        elif not values[span].any():
            sparse += size
    return GroupStats(power, sparse, elements)


def _refuse_nonfinite(names: list[str], stats: psap_kernels.LayerStats) -> None:
    bad = stats.layer_counts[:, 1].cpu()
    if bool(bad.any()):
        worst = int(bad.argmax())
        raise PsapError(
            f"{names[worst]} holds {int(bad[worst])} values that are not finite; if the "
            "training has diverged, go back to a checkpoint from before; nothing was pruned"
        )


def importance(stats: GroupStats, score: Literal["l1", "l2"] = "l2") -> Floats:
    """a_g,i: the norm of a channel's filters, each producer relative to its own mean.

    Returns:
        float64 [C_g].
    """
    mean = np.maximum(stats.power.mean(axis=1, keepdims=True), 1e-300)
    relative = (stats.power / mean).mean(axis=0)
    result: Floats = np.sqrt(relative) if score == "l2" else relative
    return result


def strongest(scores: Floats, count: int) -> tuple[int, ...]:
    """Indices of the ``count`` largest scores, ascending; ties keep the lower index."""
    order = np.argsort(-np.nan_to_num(scores, nan=-1e9), kind="stable")
    return tuple(sorted(order[:count].tolist()))


def summands(graph: Graph) -> Floats:
    """M_g of equation 3: how many layers make the channels of each group together, [groups].

    A depthwise convolution does not count: it has one input per filter, and works on channels that
    other layers made.
    """
    makers = [[graph.shapes[p] for p in group.producers] for group in graph.groups]
    mixing = [sum(len(shape) < 2 or shape[1] > 1 for shape in shapes) for shapes in makers]
    return np.maximum(1.0, np.array(mixing, dtype=np.float64))
