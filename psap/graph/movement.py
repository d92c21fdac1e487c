"""Rules of pooling, reductions and movement: where they can, they run on the labels themselves."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from psap.graph.common import first, reduced, vector
from psap.graph.labels import TAINT
from psap.graph.trace import MERGED, Args, Rule, Tracer, View


def pools(t: Tracer, a: Args, out: Any) -> None:
    """Combine positions within a channel, [N, C, ...] to [N, C, ...]."""
    labels = t.get(a.get("self", a.get("input")))
    if labels is None:
        return
    y = first(out)
    lead = labels.dim() - (y.dim() - 2)
    if any(labels.shape[dim] > 1 for dim in range(lead, labels.dim())):
        t.freeze(labels, "channels lie along a pooled dimension")
        return
    t.set(y, labels)
    if isinstance(out, (tuple, list)):
        for positions in out[1:]:  # of the maxima: they do not become zero
            t.set(positions, t.taint(labels, "the positions of a pooling"))


def reshapes(t: Tracer, a: Args, out: Tensor) -> None:
    """View, reshape, flatten; a parameter keeps its identity if it only gets dimensions of 1."""
    x = a["self"]
    view = t.view(x)
    if view is not None:
        dims = _stretched(tuple(x.shape), tuple(out.shape), view.dims)
        dims = dims or _merged(t.shapes[view.name], tuple(out.shape), view.dims)
        if dims is not None:
            t.set_view(out, View(view.name, dims, view.kind))
            t.keep_view(x)
        return
    labels = t.get(x)
    if labels is None:
        return
    if x.dim() and out.dim() and labels.shape[0] == 1 and x.shape[0] == out.shape[0]:
        full = labels.expand(1, *x.shape[1:]).reshape(1, *out.shape[1:])  # one sample is enough
    else:
        full = labels.expand(x.shape).reshape(out.shape)
    t.set(out, full)
    after = t.get(out)
    if after is not None and _varying(labels) > max(1, _varying(after)):
        _block(t, labels)


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


def restrides(t: Tracer, a: Args, out: Tensor) -> None:
    """``as_strided_`` of a pooled [N, C, 1, 1] to channels_last: the same elements in place."""
    labels = t.get(a["self"])
    if labels is None:
        return
    if list(a["size"][2:]) == [1] * (out.dim() - 2) and list(a["stride"][:2]) == [out.shape[1], 1]:
        t.set(out, labels)
    else:
        t.freeze(labels, "as_strided may mix channels")


def expands(t: Tracer, a: Args, out: Tensor) -> None:
    """Broadcasting, also to more dimensions."""
    labels = t.full(a["self"])
    if labels is not None:
        t.set(out, labels)


def permutes(op: Any) -> Rule:
    """Permutations also work on parameters, which keep their identity."""

    def rule(t: Tracer, a: Args, out: Tensor) -> None:
        x = a["self"]
        rest = [v for k, v in a.items() if k != "self"]
        view = t.view(x)
        if view is not None:
            t.set_view(out, View(view.name, _permuted(op, view.dims, rest), view.kind))
            t.keep_view(x)
            return
        labels = t.full(x)
        if labels is not None:
            t.set(out, op(labels, *rest))

    return rule


def _permuted(op: Any, dims: tuple[int, ...], rest: list[Any]) -> tuple[int, ...]:
    """Where the dimensions go, read off the strides of a probe."""
    probe = torch.empty_strided([1] * len(dims), list(range(1, len(dims) + 1)))
    return tuple(dims[stride - 1] for stride in op(probe, *rest).stride())


def same(t: Tracer, a: Args, out: Tensor) -> None:
    """Copies and casts of an activation or a parameter."""
    x = next(iter(a.values()))
    view = t.view(x)
    if view is not None and out.shape == x.shape:
        t.set_view(out, view)
        t.keep_view(x)
        return
    labels = t.get(x)
    if labels is not None and out.shape == x.shape:
        t.set(out, labels)


def moves(op: Any) -> Rule:
    """Slice, select, split and the like: the same op on the labels."""

    def rule(t: Tracer, a: Args, out: Any) -> None:
        values = list(a.values())
        labels = t.full(values[0])
        if labels is None and t.view(values[0]) is not None and isinstance(out, Tensor):
            reshapes(t, a, out)
            if t.view(out) is None:
                labels = vector(t, values[0])
        if labels is None:
            return
        labels = labels.expand(values[0].shape)
        moved = op(labels, *[v.cpu() if isinstance(v, Tensor) else v for v in values[1:]])
        if isinstance(out, (tuple, list)):
            for y, part in zip(out, moved, strict=True):
                t.set(y, part)
        else:
            t.set(out, moved)

    return rule


def selects(t: Tracer, a: Args, out: Tensor) -> None:
    """One position of a dimension; a channel that is chosen by its number stays."""
    labels = t.full(a["self"])
    if labels is None:
        return
    moved = labels.select(int(a["dim"]), int(a["index"]))
    compacted = t.get(a["self"])
    if compacted is not None and compacted.shape[int(a["dim"])] > 1:
        t.freeze(moved, "chosen by its position")
    t.set(out, moved)


def pixel_shuffle(t: Tracer, a: Args, out: Tensor) -> None:
    """Channels move into space; those of one output channel go together."""
    labels = t.full(a["self"])
    if labels is None:
        return
    moved = torch.pixel_shuffle(labels, int(a["upscale_factor"]))
    t.labels.unite(moved[:1], moved[:1, :, :1, :1])
    t.set(out, moved)


def shifts(op: Any) -> Rule:
    """Roll and index_select: fixed positions, so not of channels."""

    def rule(t: Tracer, a: Args, out: Tensor) -> None:
        labels = t.get(a["self"])
        if labels is None:
            return
        given = a["dims"] if "dims" in a else a["dim"]
        dims = reduced({"dim": given}, labels.dim())
        if any(labels.shape[dim] > 1 for dim in dims):
            t.freeze(labels, f"{op.__name__} moves channels by fixed positions")
        elif all(x == y for x, y in zip(a["self"].shape, out.shape, strict=True)):
            t.set(out, labels)
        else:
            t.set(out, labels.expand([y if d in dims else -1 for d, y in enumerate(out.shape)]))

    return rule


def pad(t: Tracer, a: Args, out: Tensor) -> None:
    """Padding within a channel keeps it; padding with channels adds fresh labels."""
    labels = t.get(a["self"])
    if labels is None:
        return
    value = a.get("value") or 0
    amounts = list(a["pad"])
    rank = labels.dim()
    for index in range(len(amounts) // 2):
        dim, (low, high) = rank - 1 - index, amounts[2 * index : 2 * index + 2]
        if not (low or high) or labels.shape[dim] == 1:
            continue
        if low < 0 or high < 0:
            t.freeze(labels, "padding that removes channels")
            return
        ends = []
        for count in (low, high):
            shape = list(labels.shape)
            shape[dim] = count
            fresh = t.labels.new(math.prod(shape)).view(shape)
            ends.append(t.taint(fresh, "padding with a constant") if value else fresh)
        labels = torch.cat([ends[0], labels, ends[1]], dim)
    if value:
        labels = t.taint(labels, "padding with a constant")
    t.set(out, labels)


def cat(t: Tracer, a: Args, out: Tensor) -> None:
    """Channels side by side."""
    tensors = a["tensors"]
    rank = out.dim()
    dim = int(a["dim"] or 0) % rank
    parts: list[Tensor] = []
    for tensor in tensors:
        if tensor.dim() != rank:
            continue
        labels = t.get(tensor)
        if labels is None:
            labels = t.labels.new(tensor.shape[dim]).view(
                [-1 if d == dim else 1 for d in range(rank)]
            )
            t.labels.freeze(labels, "concatenated data without channels")
            labels = labels | TAINT
        parts.append(labels)
    if len(parts) == 1:
        t.set(out, parts[0])
        return
    shape = [max(part.shape[d] for part in parts) for d in range(rank)]
    if _varies(parts, dim):
        wide = [
            p.expand([*shape[:dim], s.shape[dim], *shape[dim + 1 :]])
            for p, s in _pairs(parts, tensors)
        ]
        t.set(out, torch.cat(wide, dim))
        return
    for part in parts[1:]:
        t.labels.unite(parts[0], part)
    t.set(out, parts[0])


def _varies(parts: list[Tensor], dim: int) -> bool:
    """Whether the concatenated dimension is one that holds channels."""
    return any(part.shape[dim] > 1 for part in parts) or all(part.numel() == 1 for part in parts)


def _pairs(parts: list[Tensor], tensors: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    rank = parts[0].dim()
    return list(zip(parts, [x for x in tensors if x.dim() == rank], strict=True))


def stack(t: Tracer, a: Args, out: Tensor) -> None:
    """Side by side along a new dimension."""
    dim = int(a["dim"] or 0) % out.dim()
    parts = []
    for tensor in a["tensors"]:
        labels = t.get(tensor)
        if labels is None:
            labels = t.labels.new(1).view([1] * tensor.dim())
            t.labels.freeze(labels, "stacked data without channels")
            labels = labels | TAINT
        parts.append(labels.unsqueeze(dim))
    t.set(out, torch.cat(torch.broadcast_tensors(*parts), dim))


def index(t: Tracer, a: Args, out: Tensor) -> None:
    """Chosen positions of one dimension that holds no channels."""
    labels = t.get(a["self"])
    given = [d for d, chosen in enumerate(a["indices"]) if chosen is not None]
    if labels is None:
        return
    if len(given) == 1 and out.dim() == labels.dim() and labels.shape[given[0]] == 1:
        t.set(out, labels)
    else:
        t.freeze(labels, "chosen by index")


def embedding(t: Tracer, a: Args, out: Tensor) -> None:
    """Rows of a table: the channels are its second dimension."""
    weight = a["weight"]
    if t.view(weight) is not None:
        t.set(out, t.claim(weight, 1, "out"))
