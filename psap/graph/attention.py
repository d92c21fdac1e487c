"""Rules of products of two activations: queries times keys, weights of positions times values.

What is summed over has channels on both sides, which live and die together: a pair of zeros adds
nothing. Channels of one factor alone are those of the result. Factors of a batch (heads) lose the
same channels, so that what is left is a tensor again.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from psap.graph.common import channels_along, first, freeze_all
from psap.graph.labels import TAINT, plain, tainted
from psap.graph.trace import Args, Tracer

FIXED = "attention whose forward() fixes the width of its heads"


def bmm(t: Tracer, a: Args, out: Tensor) -> None:
    """``self @ mat2``, [B, N, K] and [B, K, M]."""
    product(t, a["self"], a["mat2"], out)


def baddbmm(t: Tracer, a: Args, out: Tensor) -> None:
    """``beta * self + alpha * (batch1 @ batch2)``; what is added has no channels."""
    freeze_all(t, "added to a product of two activations", a["self"])
    product(t, a["batch1"], a["batch2"], out)
    labels = t.get(out)
    if labels is not None and a["beta"] != 0:
        t.freeze(labels, "added to a product of two activations")


def product(t: Tracer, x: Tensor, y: Tensor, out: Tensor) -> None:
    """A product of activations over the last dimension of ``x`` and the last but one of ``y``."""
    inner = x.shape[-1]
    macs = out.numel() * inner
    left, right = t.get(x), t.get(y)
    summed = _varies(left, -1), _varies(right, -2)
    given = _varies(left, -2), _varies(right, -1)
    if any(summed):
        _summed(t, (x, left), (y, right), macs)
    elif given[0] != given[1]:
        tensor, labels, dim = (x, left, -2) if given[0] else (y, right, -1)
        freeze_all(t, "a product with data that has other channels", y if given[0] else x)
        assert labels is not None
        _given(t, tensor, labels, dim, out, macs)
    else:
        freeze_all(t, "a product of two activations", x, y)
        _count(t, None, macs)


def _count(t: Tracer, channels: Tensor | None, macs: float) -> None:
    """Note what a product costs, of which each channel has an equal part, and where it is."""
    if channels is not None and (call := t.innermost()) is not None:
        t.attending.note(call, channels)
    if channels is not None and t.counting:
        t.products.append((plain(channels), macs / channels.numel()))
    elif t.counting:
        t.fixed_macs += macs


def _varies(labels: Tensor | None, dim: int) -> bool:
    return labels is not None and labels.shape[dim] > 1


def _summed(
    t: Tracer, x: tuple[Tensor, Tensor | None], y: tuple[Tensor, Tensor | None], macs: int
) -> None:
    """Unite the channels that a product sums over; its result has none."""
    both = [
        None if labels is None or labels.shape[dim] == 1 else _along(t, tensor, labels, dim)
        for (tensor, labels), dim in ((x, -1), (y, -2))
    ]
    t.closed = True
    if both[0] is None or both[1] is None:
        freeze_all(t, "a product with data that has a fixed number of channels", x[0], y[0])
        _count(t, None, macs)
        return
    t.labels.unite(both[0], both[1])
    t.settle(both[0] & (both[1] | TAINT - 1))
    _scaled(t, both[0])
    _count(t, both[0], macs)


def _scaled(t: Tracer, channels: Tensor) -> None:
    """Queries and keys of an attention that divides by the root of their width."""
    if t.attention == "fixed":
        t.freeze(channels, FIXED)
    elif t.attention in ("implicit", "known") and t.gated:
        t.freeze(channels, "attention scales by the width of its heads, which would change")
    elif t.attention in ("implicit", "known"):
        t.count_channels(channels)


def _given(t: Tracer, x: Tensor, labels: Tensor, dim: int, out: Tensor, macs: int) -> None:
    """Channels of one factor that the result has, too."""
    channels = _along(t, x, labels, dim)
    if channels is None:
        _count(t, None, macs)
        return
    if t.attention == "fixed":
        t.freeze(channels, FIXED)
    elif t.attention == "known":
        t.count_channels(channels)
    _count(t, channels, macs)
    t.set(out, channels.view([-1 if d == dim % out.dim() else 1 for d in range(out.dim())]))


def _along(t: Tracer, x: Tensor, labels: Tensor, dim: int) -> Tensor | None:
    """Labels along one dimension, united over all others, with the taint of any of them."""
    dim %= labels.dim()
    channels = channels_along(t, x, labels, dim, "a product of two activations")
    if channels is None:
        return None
    others = [d for d in range(labels.dim()) if d != dim]
    return channels | tainted(labels).amax(others)


def attends(t: Tracer, a: Args, out: Any) -> None:
    """A fused attention: [B, H, N, K] queries, [B, H, M, K] keys, [B, H, M, V] values."""
    query, key, value, y = a["query"], a["key"], a["value"], first(out)
    mask = a.get("attn_mask", a.get("attn_bias"))
    freeze_all(t, "a mask of attention that has channels", mask)
    pairs = math.prod(y.shape[:-1]) * key.shape[-2]
    left, right, labels = t.get(query), t.get(key), t.get(value)
    for tensor, found in ((query, left), (key, right), (value, labels)):
        if _varies(found, -2):
            freeze_all(t, "attention over channels", tensor)
    if _varies(left, -1) or _varies(right, -1):
        turned = None if right is None else right.transpose(-1, -2)
        _summed(t, (query, left), (key.transpose(-1, -2), turned), pairs * query.shape[-1])
    else:
        freeze_all(t, "a product of two activations", query, key)
        _count(t, None, pairs * query.shape[-1])
    t.closed = True
    if labels is None or not _varies(labels, -1):
        freeze_all(t, "a product of two activations", value)
        _count(t, None, pairs * value.shape[-1])
        return
    _given(t, value, labels, -1, y, pairs * value.shape[-1])
