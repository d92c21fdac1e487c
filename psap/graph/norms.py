"""Rules of norms that divide by a number of channels: exact if the small network counts all."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from psap.graph.common import channels_along, computed, first
from psap.graph.labels import plain
from psap.graph.trace import Args, Tracer


def layer_norm(t: Tracer, a: Args, out: Any) -> None:
    """Statistics over the last dimensions; zero channels take part in them."""
    x = a["input"]
    labels = t.get(x)
    if labels is None:
        return
    last = len(a["normalized_shape"])
    across = [d for d in range(labels.dim() - last, labels.dim()) if labels.shape[d] > 1]
    if not across:
        t.set(first(out), t.taint(labels, "layer norm"))
        return
    vectors = [v for v in (a.get("weight"), a.get("bias")) if v is not None]
    if t.gated or len(across) > 1 or computed(t, *vectors) or _only_bias(a):
        t.freeze(labels, "layer norm over the channels: its statistics would change")
        return
    channels = channels_along(t, x, labels, across[0], "layer norm")
    if channels is not None:
        at = across[0] - (labels.dim() - last)
        _normalised(t, labels, channels, [(v, at) for v in vectors], first(out))


def _only_bias(a: Args) -> bool:
    """Whether zeros of the affine pair leave something there."""
    return a.get("weight") is None and a.get("bias") is not None


def _normalised(
    t: Tracer, labels: Tensor, channels: Tensor, vectors: list[tuple[Tensor, int]], out: Tensor
) -> None:
    """The channels of the result: zero again if an affine pair is, else no longer zero."""
    t.settle(labels)
    t.count_channels(labels)
    clean = plain(channels)
    for vector, dim in vectors:
        t.labels.unite(t.claim(vector, dim, "out", clean), clean)
    t.set(out, plain(labels) if vectors else t.taint(labels, "a norm"))


def group_norm(t: Tracer, a: Args, out: Any) -> None:
    """Statistics over groups of channels, which keep equal counts."""
    labels = t.get(a["input"])
    if labels is None:
        return
    channels = channels_along(t, a["input"], labels, 1, "group norm")
    if channels is None:
        return
    vectors = [v for v in (a["weight"], a["bias"]) if v is not None]
    if _only_bias(a):
        t.freeze(labels, "group norm with a bias alone")
        return
    alone = int(a["group"]) == channels.numel()
    if t.gated and not alone:
        t.freeze(labels, "group norm over several channels: its statistics would change")
        return
    if computed(t, *vectors) or (alone and not vectors):
        t.freeze(labels, "group norm without parameters of its own")
        return
    pairs = [(v, 0) for v in vectors]
    if not alone:
        rows = channels.view(int(a["group"]), -1)
        t.labels.unite(rows, rows[0])
        _normalised(t, labels, channels, pairs, first(out))
        return
    clean = plain(channels)
    for vector, _ in pairs:
        t.labels.unite(t.claim(vector, 0, "out", clean), clean)
    t.set(first(out), plain(labels))


def rms_norm(t: Tracer, a: Args, out: Any) -> None:
    """The mean square over the last dimensions."""
    layer_norm(t, {**a, "bias": None}, out)
