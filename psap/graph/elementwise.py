"""Rules of element-wise ops: they unite the channels of their operands, and may move zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from psap.graph.common import channels_along, first, freeze_all, vector
from psap.graph.labels import TAINT, plain, tainting
from psap.graph.trace import Args, Rule, Tracer
from psap.graph.weights import scales


def keeps_zero(t: Tracer, a: Args, out: Any) -> None:
    """f(0) = 0: the channel stays zero."""
    labels = vector(t, next(iter(a.values())))
    _no_others(t, a, labels)
    if labels is not None:
        t.set(first(out), labels)


def _no_others(t: Tracer, a: Args, labels: Tensor | None) -> None:
    """Freeze the channels of all arguments if there are more tensors than the first."""
    others = [v for v in list(a.values())[1:] if isinstance(v, Tensor) and v.numel() > 1]
    if others:
        freeze_all(t, "an element-wise op with several tensors", *others)
        if labels is not None:
            t.freeze(labels, "an element-wise op with several tensors")


def moves_zero(name: str) -> Rule:
    """f(0) != 0: the channel stays apart, but a pruned one is no longer zero."""

    def rule(t: Tracer, a: Args, out: Any) -> None:
        labels = vector(t, next(iter(a.values())))
        _no_others(t, a, labels)
        if labels is not None:
            t.set(first(out), t.taint(labels, name))

    return rule


def clamp(t: Tracer, a: Args, out: Tensor) -> None:
    """Keeps zero if zero lies between the bounds."""
    low = a.get("min", a.get("min_val"))
    high = a.get("max", a.get("max_val"))
    numbers = [v for v in (low, high) if v is not None]
    inside = all(not isinstance(v, Tensor) for v in numbers)
    inside = inside and (low is None or low <= 0) and (high is None or high >= 0)
    (keeps_zero if inside else moves_zero("clamp"))(t, a, out)


def power(t: Tracer, a: Args, out: Tensor) -> None:
    """Keeps zero for a positive exponent."""
    exponent = a["exponent"]
    positive = isinstance(exponent, (int, float)) and exponent > 0
    (keeps_zero if positive else moves_zero("pow"))(t, a, out)


def prelu(t: Tracer, a: Args, out: Tensor) -> None:
    """A slope per channel, or one for all."""
    labels = t.get(a["self"])
    weight = a["weight"]
    if labels is None:
        return
    if weight.numel() == 1:
        t.keep_view(weight)
    else:
        channels = channels_along(t, a["self"], labels, 1, "prelu")
        if channels is None:
            return
        view = t.view(weight)
        dims = [d for d in range(weight.dim()) if weight.shape[d] > 1]
        if view is None or len(dims) != 1:
            t.freeze(labels, "prelu with a computed slope")
            return
        clean = plain(channels)
        t.labels.unite(t.claim(weight, dims[0], "slope", clean), clean)
    t.set(out, labels)


def _operand(t: Tracer, x: Any, like: Tensor) -> Tensor | None:
    """Labels of an operand; a parameter takes its labels where those of ``like`` vary."""
    labels = t.get(x)
    view = t.view(x)
    if labels is not None or view is None:
        return labels
    if x.numel() == 1:
        t.keep_view(x)
        return None
    offset = like.dim() - x.dim()
    varying = [d - offset for d in range(like.dim()) if like.shape[d] > 1]
    if len(varying) != 1 or not 0 <= varying[0] < x.dim() or x.shape[varying[0]] == 1:
        t.keep_view(x)
        return None
    dim = varying[0]
    if x.shape[dim] != like.shape[dim + offset]:
        return None
    side = t.claim(x, dim, "out")
    return side.view([-1 if d == dim else 1 for d in range(x.dim())])


def _binary(t: Tracer, a: Args, out: Tensor, product: bool, name: str) -> None:
    x, y = a["self"], a["other"]
    left, right = t.get(x), t.get(y)
    if left is None or right is None:
        known = left if left is not None else right
        if known is None:
            known = vector(t, x) if vector(t, x) is not None else vector(t, y)
        if known is None:
            return
        left, right = _operand(t, x, known), _operand(t, y, known)
    if left is None or right is None:
        one, constant = (right, x) if left is None else (left, y)
        if one is not None:
            t.set(out, _with_constant(t, one, constant, product, name))
        return
    left, right = _same_rank(left, right)
    alike = left.shape == right.shape
    if not alike and _spread(t, (x, left), (y, right), out, product, name):
        return
    t.labels.unite(left, right)
    if alike and not tainting(left if product else right):
        t.set(out, left)
    else:
        t.set(out, left & (right | TAINT - 1) if product else left | right & TAINT)


def _same_rank(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.dim() == b.dim():
        return a, b
    rank = max(a.dim(), b.dim())
    left, right = (x.view([1] * (rank - x.dim()) + list(x.shape)) for x in (a, b))
    return left, right


def _with_constant(t: Tracer, labels: Tensor, constant: Any, product: bool, name: str) -> Tensor:
    """Labels after an operand that has none: a number, or data without channels."""
    if isinstance(constant, Tensor) and constant.dim():
        _fixed(t, labels, constant, name)
    elif not isinstance(constant, Tensor) and (product or constant == 0):
        return labels
    return labels if product else t.taint(labels, f"{name} of a constant")


def _fixed(t: Tracer, labels: Tensor, constant: Tensor, name: str) -> None:
    """Keep the dimensions that data without channels has, too: others may go, at all positions."""
    head, offset = labels, labels.dim() - constant.dim()
    sized = t.sizes.spread.get(constant) is not None
    for dim in range(constant.dim()):
        broadcast = constant.stride(dim) == 0 and not sized
        if constant.shape[dim] > 1 and not broadcast and dim + offset >= 0:
            head = head.narrow(dim + offset, 0, 1)
    if head.numel() == labels.numel():
        return
    if head.numel() ** 2 >= labels.numel():  # else those of whole heads would be all that is left
        t.labels.unite(labels, head)
    else:
        t.freeze(labels, f"{name} with data that has a fixed number of channels")


def _spread(
    t: Tracer, x: tuple[Any, Tensor], y: tuple[Any, Tensor], out: Tensor, product: bool, name: str
) -> bool:
    """One operand is broadcast over the channels of the other: it may not be pruned.

    Unless it has channels of its own, such that those of the other one at equal positions may go
    with them (masks of several sources, times one mixture).
    """
    for (small, narrow), (_, wide) in ((x, y), (y, x)):
        offset = wide.dim() - small.dim()
        for dim in range(wide.dim()):
            size = small.shape[dim - offset] if dim >= offset else 1
            if size == 1 and wide.shape[dim] > 1 and wide.shape[dim] != narrow.shape[dim]:
                if narrow.numel() > 1 and narrow.numel() ** 2 >= wide.numel():
                    return False
                t.freeze(narrow, f"{name} spreads it over other channels")
                _even(t, wide, narrow)
                t.set(out, wide if product else t.taint(wide, f"{name} of a spread channel"))
                return True
    return False


def _even(t: Tracer, wide: Tensor, narrow: Tensor) -> None:
    """Unite channels along the dimensions that another operand has, too, and keeps."""
    head = wide
    for dim in range(wide.dim()):
        if narrow.shape[dim] > 1:
            head = head.narrow(dim, 0, 1)
    if head.numel() < wide.numel():
        t.labels.unite(wide, head)


def add(t: Tracer, a: Args, out: Tensor) -> None:
    """Sum or difference, or a maximum or minimum: zero if both sides are."""
    _binary(t, a, out, False, "add")


def mul(t: Tracer, a: Args, out: Tensor) -> None:
    """Product: zero if one side is."""
    if not scales(t, a["self"], a["other"], out):
        _binary(t, a, out, True, "mul")


def glu(t: Tracer, a: Args, out: Tensor) -> None:
    """The first half along a dimension, times gates that the second half makes."""
    labels = t.full(a["self"])
    if labels is not None:
        values, gates = labels.chunk(2, a["dim"])
        t.labels.unite(values, gates)
        t.set(out, values)


def div(t: Tracer, a: Args, out: Tensor) -> None:
    """Quotient: the numerator decides; channels in the denominator may not vanish."""
    if scales(t, a["self"], a["other"], out):
        return
    below = vector(t, a["other"])
    if t.view(a["other"]) is not None or (below is not None and bool((below < TAINT).any())):
        freeze_all(t, "a channel is divided by", a["self"], a["other"])
        return
    _binary(t, a, out, True, "div")


def addcmul(t: Tracer, a: Args, out: Tensor) -> None:
    """``self + value * tensor1 * tensor2``."""
    shape = torch.broadcast_shapes(a["tensor1"].shape, a["tensor2"].shape)
    product = out.new_empty(1).expand(shape)
    _binary(t, {"self": a["tensor1"], "other": a["tensor2"]}, product, True, "mul")
    _binary(t, {"self": a["self"], "other": product}, out, False, "add")
