"""What the sizes and numbers of a dense program are in the small one."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from psap.errors import VerificationError
from psap.graph.labels import Ints
from psap.graph.trace import MERGED, View

Mask = NDArray[np.bool_]
Stays = list[Mask | None]
"""For every dimension of an activation a bool mask [size], or None if all of it stays."""


@dataclass
class Record:
    """What one run of the dense program showed.

    Attributes:
        labels: channel labels of every value that has some.
        values: shapes of tensors, and values of everything else.
        views: which parameter a value is.
        kept: positions of each parameter that stay, by dimension.
        shapes: shapes of the parameters.
        constants: tensors that the small program needs, by name.
        stays: what `stays_of` has found, for one choice of channels.
    """

    labels: dict[fx.Node, Tensor] = field(default_factory=dict)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    views: dict[fx.Node, View] = field(default_factory=dict)
    kept: Mapping[str, Mapping[int, tuple[int, ...]]] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    stays: dict[fx.Node, Stays | None] = field(default_factory=dict)

    def of_parameter(self, node: fx.Node) -> Stays | None:
        """Which positions of a parameter stay, per dimension of the value that it is."""
        view = self.views[node]
        kept = self.kept.get(view.name, {})
        if not kept:
            return None
        masks: list[Mask] = []
        for dim, size in enumerate(self.shapes[view.name]):
            mask = np.full(size, dim not in kept)
            if dim in kept:
                mask[np.array(kept[dim], dtype=np.int64)] = True
            masks.append(mask)
        if view.rows:
            masks[0] = masks[0][slice(*view.rows)]
        found: dict[int, Mask | None] = {-1: None, **dict(enumerate(masks))}
        if MERGED in view.dims:
            rest = np.ones(1, dtype=np.bool_)
            for mask in masks[1:]:
                rest = (rest[:, None] & mask).reshape(-1)
            found[MERGED] = rest
        return [None if (m := found[d]) is None or m.all() else m for d in view.dims]


def stays_of(node: Any, record: Record, alive: Ints) -> Stays | None:
    """Which positions of an activation stay, per dimension; None if nothing goes."""
    if node not in record.stays:
        record.stays[node] = _stays(node, record, alive)
    return record.stays[node]


def _stays(node: Any, record: Record, alive: Ints) -> Stays | None:
    labels = record.labels.get(node)
    if node in record.views:
        return record.of_parameter(node)
    if labels is None:
        return None
    lives = alive[labels.numpy()] > 0
    if lives.all():
        return None
    dims = range(lives.ndim)
    if not lives.any() and len(record.values[node]) > 1:
        gone = np.zeros(record.values[node][1], dtype=np.bool_)  # a slice of what goes
        return [gone if dim == 1 else None for dim in dims]
    wide = [dim for dim in dims if lives.shape[dim] > 1]
    along = {dim: lives.any(axis=tuple(d for d in dims if d != dim)) for dim in wide}
    if len(wide) > 1:
        block = functools.reduce(
            np.logical_and, np.meshgrid(*along.values(), indexing="ij", sparse=True)
        )
        if not np.array_equal(block, lives.squeeze()):
            raise VerificationError(
                f"the channels of {node.name} cannot be removed: they form no block"
            )
    return [along.get(dim) for dim in dims]


def numbers(node: fx.Node, twin: fx.Node, record: Record, alive: Ints) -> None:
    """Numbers that tensors are scaled by stay what they were, if they come from a width."""
    if not isinstance(record.values.get(node), torch.Size):
        return
    scales = getattr(node.target, "__name__", node.target) in _SCALES

    def dense(given: fx.Node, copy: Any) -> Any:
        known = record.values.get(given)
        if not (isinstance(known, float) or (scales and type(known) is int)):
            return copy
        small = in_small(given, record, alive)
        if small is None or small == known:
            return copy
        if not all(_leaves(given, record, alive)):
            raise VerificationError(f"a number at {node.name} depends on several sizes")
        return known

    twin.args = tuple(
        dense(a, b) if isinstance(a, fx.Node) else b
        for a, b in zip(node.args, twin.args, strict=True)
    )
    twin.kwargs = {
        k: dense(a, twin.kwargs[k]) if isinstance(a, fx.Node) else twin.kwargs[k]
        for k, a in node.kwargs.items()
    }


_SCALES = ("mul", "mul_", "div", "div_", "truediv", "multiply", "divide", "pow")
"""Calls whose second operand may be a number of channels."""


def _leaves(value: Any, record: Record, alive: Ints) -> list[bool]:
    """For every size that a number comes from whether the small network has another one."""
    if not isinstance(value, fx.Node):
        return []
    sizes = [a for a in value.args if isinstance(a, fx.Node)]
    if any(isinstance(record.values.get(a), torch.Size) for a in sizes):
        return [in_small(value, record, alive) != record.values[value]]
    return [leaf for a in sizes for leaf in _leaves(a, record, alive)]


def in_small(value: Any, record: Record, alive: Ints) -> Any:
    """What arithmetic on sizes gives in the small network; None if that is not known."""
    if not isinstance(value, fx.Node):
        return value
    known = record.values.get(value)
    sizes = isinstance(known, torch.Size)
    source = value.args[0] if value.args else None
    if isinstance(source, fx.Node) and isinstance(record.values.get(source), torch.Size):
        if sizes and value.target in (getattr, "size"):  # of a tensor: x.shape or x.size()
            return small_shape(source, record, alive)
        if value.target == "size" and len(value.args) == 2:
            at = in_small(value.args[1], record, alive)
            return None if at is None else small_shape(source, record, alive)[at]
    if value.target == "numel" and isinstance(source, fx.Node):
        return math.prod(small_shape(source, record, alive))
    if sizes or not isinstance(known, (int, float, torch.Size)) or value.op != "call_function":
        return None
    args = [in_small(arg, record, alive) for arg in value.args]
    if any(arg is None for arg in args) or value.target not in _ARITHMETIC:
        return None
    return value.target(*args)


COMPARISONS = (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge)
"""Calls on which forward() may branch."""

_ARITHMETIC = (
    operator.getitem, operator.floordiv, operator.mul, operator.add, operator.sub, operator.mod,
    operator.truediv, operator.pow, operator.neg, math.sqrt, float, int, *COMPARISONS,
)  # fmt: skip


def compare(node: fx.Node, twin: fx.Node, record: Record, alive: Ints) -> None:
    """Let a comparison of a size with a number come out as it does in the dense network."""
    small = in_small(node, record, alive)
    if small is None or small == record.values[node]:
        return
    known = [record.values[arg] if isinstance(arg, fx.Node) else arg for arg in node.args]
    moved = [in_small(arg, record, alive) for arg in node.args]
    fixed = [at for at, arg in enumerate(node.args) if type(arg) in (int, float)]
    if len(fixed) != 1:
        raise VerificationError(f"the comparison at {node.name} depends on several sizes")
    number, size = fixed[0], 1 - fixed[0]
    twin.update_arg(number, known[number] + moved[size] - known[size])


def small_shape(source: fx.Node, record: Record, alive: Ints) -> list[int]:
    """The shape of an activation in the small network."""
    shape = record.values[source]
    before = stays_of(source, record, alive) or [None] * len(shape)
    return [n if mask is None else int(mask.sum()) for n, mask in zip(shape, before, strict=True)]
