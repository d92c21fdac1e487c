"""Rules of pooling, reductions and movement: where they can, they run on the labels themselves."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from psap.graph.common import first, reduced, vector
from psap.graph.labels import TAINT
from psap.graph.reshaping import same_parameter
from psap.graph.trace import Args, Rule, Tracer
from psap.graph.weights import CUTS, rows


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
    labels = vector(t, a["self"])
    if labels is not None:
        t.set(out, labels.expand(a["self"].shape))


def permutes(op: Any) -> Rule:
    """Permutations also work on parameters, which keep their identity."""

    def rule(t: Tracer, a: Args, out: Tensor) -> None:
        x = a["self"]
        rest = [v for k, v in a.items() if k != "self"]
        view = t.view(x)
        if view is not None:
            t.set_view(out, replace(view, dims=_permuted(op, view.dims, rest)))
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
        if op in CUTS and rows(t, a, out):
            return
        if isinstance(out, Tensor) and same_parameter(t, values[0], out):
            return
        labels = vector(t, values[0])
        if labels is None:
            return
        labels = labels.expand(values[0].shape)
        moved = op(labels, *[v.cpu() if isinstance(v, Tensor) else v for v in values[1:]])
        if isinstance(out, (tuple, list)):
            _apart(t, values[0], a, out)
            for y, part in zip(out, moved, strict=True):
                t.set(y, part)
        else:
            t.set(out, moved)

    return rule


def _apart(t: Tracer, x: Tensor, a: Args, out: Any) -> None:
    """Positions of a dimension as tensors of their own, such as queries, keys and values."""
    labels = t.get(x)
    dim = int(a.get("dim") or 0) % x.dim()
    gone = all(y.dim() < x.dim() for y in out)
    if labels is None or not (gone or all(y.shape[dim] == 1 for y in out)):
        return
    if not _stays_whole(t, labels, dim) and gone:
        t.freeze(labels, "chosen by its position")


def _stays_whole(t: Tracer, labels: Tensor, dim: int) -> bool:
    """Let all positions of a dimension lose the same channels, so that none of them goes.

    Returns:
        Whether they could: False if the channels lie along this dimension alone.
    """
    if labels.shape[dim] > 1:
        if labels.numel() == labels.shape[dim]:
            return False
        t.labels.unite(labels, labels.narrow(dim, 0, 1))
    return True


def selects(t: Tracer, a: Args, out: Tensor) -> None:
    """One position of a dimension; a channel that is chosen by its number stays."""
    labels = t.get(a["self"])
    if labels is None:
        return
    dim = int(a["dim"]) % labels.dim()
    moved = labels.expand(a["self"].shape).select(dim, int(a["index"]))
    if not _stays_whole(t, labels, dim):
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


def unfolds(t: Tracer, a: Args, out: Tensor) -> None:
    """Windows of one dimension, as a new last one."""
    labels = t.get(a["self"])
    if labels is None:
        return
    if labels.shape[int(a["dimension"])] > 1:
        t.freeze(labels, "windows that slide over channels")
    else:
        t.set(out, labels.unsqueeze(-1))


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
