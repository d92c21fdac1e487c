"""Rules of what combines positions along whole dimensions: sums, means, norms, softmax."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from psap.graph.common import first, reduced
from psap.graph.labels import plain, tainted
from psap.graph.trace import Args, Tracer


def _mixed(t: Tracer, labels: Tensor, dims: list[int]) -> Tensor | None:
    """Labels after positions along ``dims`` have met: those go together, others stay apart.

    Returns:
        Labels of size 1 along ``dims``, or None if no others are left: the channels themselves met.
    """
    head = plain(labels)
    for dim in dims:
        head = head.narrow(dim, 0, 1)
    if head.numel() == 1 and labels.numel() > 1:
        return None
    t.labels.unite(labels, head)
    return head | tainted(labels).amax(dims, keepdim=True)


def reduces(t: Tracer, a: Args, out: Any) -> None:
    """Maximum, variance: within a channel, or over several that go together."""
    labels = _reduce(t, a, out)
    if labels is not None:
        t.freeze(labels, "reduced over the channels")


def means(t: Tracer, a: Args, out: Any) -> None:
    """A mean over channels, too, if the small network divides by the number that there was."""
    labels = _reduce(t, a, out)
    if labels is None:
        return
    if t.gated:
        t.freeze(labels, "reduced over the channels")
        return
    t.settle(labels)
    t.count_channels(labels)
    t.closed = True


def sizes(t: Tracer, a: Args, out: Any) -> None:
    """A norm of vectors: of positive order, it does not miss zeros."""
    (sums if a["ord"] > 0 else reduces)(t, a, out)


def sums(t: Tracer, a: Args, out: Any) -> None:
    """A sum over channels does not miss zeros; nor does one over those of every head."""
    whole = t.get(a["self"])
    if whole is not None:
        dims = reduced(a, whole.dim())
        inner = math.prod(whole.shape[d] for d in dims)
        head = whole
        for dim in range(whole.dim()):
            head = head if dim in dims else head.narrow(dim, 0, 1)
        if 1 < whole.numel() // inner < inner:
            t.labels.unite(whole, head)
            t.settle(whole)
            t.closed = True
            return
    labels = _reduce(t, a, out)
    if labels is not None:
        t.settle(labels)
        t.closed = True


def _reduce(t: Tracer, a: Args, out: Any) -> Tensor | None:
    """Give labels to the result; or return the input's, if its channels met in it."""
    labels = t.get(a["self"])
    if labels is None:
        return None
    dims = reduced(a, labels.dim())
    mixed = _mixed(t, labels, dims)
    if mixed is None:
        return labels
    _drop(t, mixed, dims, out, bool(a.get("keepdim")))
    return None


def _drop(t: Tracer, labels: Tensor, dims: list[int], out: Any, keep: bool) -> None:
    y = first(out)
    t.set(y, labels if keep else labels.squeeze(tuple(dims)))


def softmax(t: Tracer, a: Args, out: Tensor) -> None:
    """Positions along one dimension share a sum; zero becomes a part of it."""
    labels = t.get(a["self"])
    if labels is None:
        return
    mixed = _mixed(t, labels, [int(a["dim"]) % labels.dim()])
    if mixed is None:
        t.freeze(labels, "softmax over the channels")
        return
    t.set(out, t.taint(mixed, "softmax"))
