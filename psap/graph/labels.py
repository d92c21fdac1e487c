"""Channel labels: integers that are united, frozen, and in the end resolved into channels.

Every position along a dimension of a parameter has a label; activations carry label tensors of
their own shape. Two labels that must live or die together are *united*. A label that must live is
*frozen*, with a reason. Unions are only recorded; `Labels.resolve` finds the connected components
of all of them at once.

A label tensor may also carry the bit `TAINT`: the value there would not be zero if the channel's
parameters were zero (for example after a sigmoid), so a consumer may not drop it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TAINT = 1 << 40
"""Bit of a label whose activation does not stay zero when its channel is pruned."""

Ints = NDArray[np.int64]


def compact(labels: Tensor) -> Tensor:
    """Narrow every dimension along which the labels do not change to size 1.

    Args:
        labels: int64 label tensor of any shape.

    Returns:
        A view that broadcasts back to the shape of ``labels``.
    """
    numbers = labels.numpy()
    for dim, (size, stride) in enumerate(zip(numbers.shape, numbers.strides, strict=True)):
        if size > 1 and (stride == 0 or _constant(numbers, dim)):
            labels = labels.narrow(dim, 0, 1)
            numbers = labels.numpy()
    return labels


def _constant(numbers: Ints, dim: int) -> bool:
    """Whether labels do not change along a dimension; the ends tell most of them apart."""
    ends = [0] * numbers.ndim
    first = numbers.item(*ends)
    ends[dim] = numbers.shape[dim] - 1
    return numbers.item(*ends) == first and bool((numbers == numbers.take([0], dim)).all())


def plain(labels: Tensor) -> Tensor:
    """The labels without their taint bit: the same tensor if they have none."""
    return labels & (TAINT - 1) if tainting(labels) else labels


def tainting(labels: Tensor) -> bool:
    """Whether any of these labels has the taint bit."""
    return labels.numel() > 0 and int(labels.numpy().max()) >= TAINT


def tainted(labels: Tensor) -> Tensor:
    """The taint bits alone."""
    return labels & TAINT


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two label tensors are one, or views of the same memory in the same way."""
    if a is b:
        return True
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


class Labels:
    """All labels of one trace."""

    def __init__(self) -> None:
        self.count = 0
        self._unions: list[tuple[Ints, Ints]] = []
        self._frozen: dict[tuple[Any, ...], tuple[Tensor, str]] = {}

    def new(self, count: int) -> Tensor:
        """Make ``count`` fresh labels, int64 [count]."""
        start = self.count
        self.count += count
        return torch.arange(start, self.count)

    def unite(self, a: Tensor, b: Tensor) -> None:
        """Bind labels that broadcast to one shape, element by element."""
        if same(a, b):
            return
        if a.shape != b.shape:
            a, b = torch.broadcast_tensors(a, b)
        self._unions.append((a.reshape(-1).numpy(), b.reshape(-1).numpy()))  # never written to

    def freeze(self, labels: Tensor, reason: str) -> None:
        """Forbid that any of these labels is pruned; the first reason given is reported."""
        labels = compact(labels)
        key = (labels.data_ptr(), labels.shape, labels.stride())
        self._frozen.setdefault(key, (labels, reason))  # which keeps the memory, so the key is one

    def resolve(self) -> tuple[Ints, dict[int, str]]:
        """Find the components.

        Returns:
            For every label its component (the smallest label in it), and the reason for every
            frozen component.
        """
        root = np.arange(self.count, dtype=np.int64)
        if self._unions:
            a = np.concatenate([pair[0] for pair in self._unions]) & (TAINT - 1)
            b = np.concatenate([pair[1] for pair in self._unions]) & (TAINT - 1)
            root = _components(root, a, b)
        frozen: dict[int, str] = {}
        if self._frozen:
            reasons = [reason for _, reason in self._frozen.values()]
            parts = [labels.reshape(-1).numpy() for labels, _ in self._frozen.values()]
            order = np.repeat(np.arange(len(parts)), [part.size for part in parts])
            first = np.full(self.count, len(parts))
            np.minimum.at(first, root[np.concatenate(parts) & (TAINT - 1)], order)
            found = np.flatnonzero(first < len(parts))
            frozen = {
                c: reasons[n] for c, n in zip(found.tolist(), first[found].tolist(), strict=True)
            }
        return root, frozen


def _components(root: Ints, a: Ints, b: Ints) -> Ints:
    """Connected components by hooking to the smaller root and pointer jumping."""
    while True:
        left, right = root[a], root[b]
        open_ = left != right
        if not open_.any():
            return root
        a, b, left, right = a[open_], b[open_], left[open_], right[open_]
        np.minimum.at(root, np.maximum(left, right), np.minimum(left, right))
        while True:
            jumped = root[root]
            if np.array_equal(jumped, root):
                break
            root = jumped
