"""Where the tensors of a model are: lists that are made once and read at every optimizer step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from psap.graph import Graph, Side

Ints = NDArray[np.int64]
Owners = Mapping[str, tuple[dict[str, Any], str]]
"""For every parameter and buffer the dict of its module that holds it, and its key there."""


class Places:
    """Tensors of a model, in a fixed order, ready for an op that is called at every step.

    Parameters keep their identity when a model moves or its data is replaced; buffers do not, so
    that they are looked up anew.

    Args:
        parameters: the parameters of the model by name.
        owners: where its parameters and buffers are.
        sides: what is wanted.

    Attributes:
        sides: the same in the order of `tensors`: buffers come last.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], owners: Owners, sides: Sequence[Side]
    ) -> None:
        owned = [s for s in sides if s[0] in parameters and not s[1]]
        moved = [s for s in sides if s[0] in parameters and s[1]]
        others = [s for s in sides if s[0] not in parameters]
        self.sides = (*owned, *moved, *others)
        self._owned = [parameters[name] for name, _ in owned]
        self._moved = [(parameters[name], dim) for name, dim in moved]
        self._others = [(*owners[name], dim) for name, dim in others]

    def tensors(self) -> list[Tensor]:
        """The tensors, with the side's dimension first; for use under no_grad."""
        found: list[Tensor] = [*self._owned]
        found += [p.movedim(dim, 0) for p, dim in self._moved]
        for buffers, key, dim in self._others:
            buffer = buffers[key]
            found.append(buffer.movedim(dim, 0) if dim else buffer)
        return found

    def gradients(self) -> list[Tensor | None]:
        """Their gradients, likewise; those of buffers are missing."""
        found: list[Tensor | None] = [p.grad for p in self._owned]
        for p, dim in self._moved:
            found.append(None if p.grad is None else p.grad.movedim(dim, 0))
        return found


@dataclass(frozen=True)
class Terms:
    """Which rows the gate derivatives are made of, for `psap_kernels.gate_stats_`.

    Attributes:
        present: for each gate, whether its gradient was there.
        places: the gates whose gradient was there.
        saved: their saved copies, and which of them each belongs to.
        terms: int32 [T, 3]; first the pairs of the tensors, then those of the copies.
        offsets: int32 [channels + 1].
    """

    present: list[bool]
    places: Places
    saved: list[tuple[int, Tensor]]
    terms: Tensor
    offsets: Tensor


def owners_of(model: nn.Module) -> Owners:
    """The dict of the module that holds a parameter or buffer, and its key there, by name."""
    found = {}
    for prefix, module in model.named_modules():
        for held in (module._parameters, module._buffers):
            for key in held:
                found[f"{prefix}.{key}" if prefix else key] = (held, key)
    return found


def block(channels: Ints, pair: int, value_rows: Ints, grad_rows: Ints) -> Ints:
    """Rows of a table of terms: channel, pair, row of the value, row of the gradient."""
    owner = channels[grad_rows]
    return np.stack([owner, np.full_like(owner, pair), value_rows, grad_rows], axis=1)


def scales(graph: Graph, weights: Set[str], side: Side) -> bool:
    """Whether what a parameter holds on a side scales its channels, so that a gate lies there.

    Filters that a norm rescales do not, nor does a bias that a batch norm subtracts.

    Args:
        graph: the channel graph.
        weights: names of the weights that it counts calls of.
        side: an "out" or "cut" side.
    """
    name = side[0]
    if graph.roles[side] == "cut":
        return True
    if name in weights:
        return name not in graph.normalised
    after = graph.normalised.get(f"{name.rpartition('.')[0]}.weight".lstrip("."), ())
    return name in graph.affine or not any(norm in graph.affine for norm in after)
