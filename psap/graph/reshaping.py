"""Rules of views: dimensions that merge and split."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from psap.graph.common import vector
from psap.graph.labels import plain
from psap.graph.trace import MERGED, Args, Tracer


def reshapes(t: Tracer, a: Args, out: Tensor) -> None:
    """View, reshape, flatten; a parameter keeps its identity if it only gets dimensions of 1."""
    x = a["self"]
    labels = None if same_parameter(t, x, out) else vector(t, x)
    if labels is None:
        return
    t.set(out, _reshaped(labels, tuple(x.shape), tuple(out.shape)))
    after = t.get(out)
    if after is None:
        return
    if _varying(labels) > max(1, _varying(after)):
        _block(t, labels)
    elif _varying(after) > max(1, _varying(labels)) and _skewed(after):
        t.freeze(after, "a view that shifts channels against each other")


def _skewed(labels: Tensor) -> bool:
    """Whether the places of a channel are no product of positions along every dimension."""
    numbers, places = plain(labels).unique(return_inverse=True)
    if numbers.numel() == labels.numel():
        return False
    blocks = torch.ones(numbers.numel(), dtype=torch.int64)
    for dim, size in enumerate(labels.shape):
        at = torch.arange(size).view([-1 if d == dim else 1 for d in range(labels.dim())])
        found = (places * size + at).unique() // size
        blocks *= found.bincount(minlength=numbers.numel())
    return bool((blocks != places.reshape(-1).bincount()).any())


def same_parameter(t: Tracer, x: Tensor, out: Tensor) -> bool:
    """Whether a parameter has only got or lost dimensions of size 1, or became rows of filters."""
    view = t.view(x)
    if view is None:
        return False
    dims = _stretched(tuple(x.shape), tuple(out.shape), view.dims)
    dims = dims or _merged(t.shapes[view.name], tuple(out.shape), view.dims)
    if dims is None:
        return False
    t.set_view(out, replace(view, dims=dims))
    t.keep_view(x)
    return True


def _reshaped(labels: Tensor, old: tuple[int, ...], new: tuple[int, ...]) -> Tensor:
    """Compact labels in another shape: what merges or splits without any stays of size 1."""
    wide: list[int] = []
    shape: list[int] = []
    i = j = 0
    while i < len(old) and j < len(new):
        ends = [i + 1, j + 1]
        sizes = [old[i], new[j]]
        while sizes[0] != sizes[1] and ends[0] <= len(old) and ends[1] <= len(new):
            short = int(sizes[1] < sizes[0])
            if ends[short] == len((old, new)[short]):
                return labels.expand(old).reshape(new)  # of an empty tensor
            sizes[short] *= (old, new)[short][ends[short]]
            ends[short] += 1
        varies = any(size > 1 for size in labels.shape[i : ends[0]])
        wide += old[i : ends[0]] if varies else [1] * (ends[0] - i)
        shape += new[j : ends[1]] if varies else [1] * (ends[1] - j)
        i, j = ends
    wide += [1] * (len(old) - i)
    shape += [1] * (len(new) - j)
    return labels.expand(wide).reshape(shape)


def _varying(labels: Tensor) -> int:
    """Along how many dimensions labels change."""
    return sum(size > 1 for size in labels.shape)


def _block(t: Tracer, labels: Tensor) -> None:
    """Unite labels that lie along several dimensions, except along the longest of these.

    What is left of a tensor must be a block again if its dimensions are merged (channel shuffle).
    """
    longest = max(range(labels.dim()), key=lambda d: (labels.shape[d], d))
    head = labels
    for dim in range(labels.dim()):
        head = head if dim == longest else head.narrow(dim, 0, 1)
    t.labels.unite(labels, head)


def _stretched(
    old: tuple[int, ...], new: tuple[int, ...], dims: tuple[int, ...]
) -> tuple[int, ...] | None:
    """The dimensions of a parameter after a view that adds or drops only those of size 1."""
    wide = [dim for size, dim in zip(old, dims, strict=True) if size != 1]
    if [size for size in new if size != 1] != [size for size in old if size != 1]:
        return None
    left = iter(wide)
    return tuple(next(left) if size != 1 else -1 for size in new)


def _merged(
    whole: tuple[int, ...], new: tuple[int, ...], dims: tuple[int, ...]
) -> tuple[int, ...] | None:
    """The dimensions of a weight after a view as rows of filters, [1, O, rest], or back."""
    straight = tuple(range(len(whole)))
    if MERGED in dims and new == whole:
        return straight
    if dims == straight and new[-2:] == (whole[0], math.prod(whole[1:])) and len(new) < 4:
        return (*[-1] * (len(new) - 2), 0, MERGED)
    return None
