"""Rules of weights that forward() computes: standardised filters, weight norm, spectral norm.

The result is still the parameter, as a `View` of another kind, so convolutions find its sides.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from psap.graph.common import freeze_all
from psap.graph.trace import MERGED, Args, Tracer, View


def tie_computed(t: Tracer, labels: Tensor | None, channels: Tensor, role: str) -> None:
    """A vector that forward() makes from parameters, for example by repeating them."""
    if labels is None or labels.numel() not in (1, channels.numel()):
        t.freeze(channels, "batch norm with vectors that are computed in forward")
        return
    if role == "out":
        t.settle(labels)
    t.labels.unite(labels, channels)


def standardises(t: Tracer, a: Args, out: Tensor) -> bool:
    """Weight standardisation: a batch norm of filters, [1, O, rest], by their own statistics."""
    x, gain = a["input"], a["weight"]
    view = t.view(x)
    rows = view is not None and view.dims in ((-1, 0, MERGED), (-1, 0, 1))
    if view is None or not rows or a["running_mean"] is not None:
        return False
    channels = t.claim(x, 1, "out")
    if isinstance(gain, Tensor) and t.view(gain) is not None:
        t.labels.unite(t.claim(gain, 0, "out"), channels)
    elif isinstance(gain, Tensor):
        tie_computed(t, t.get(gain), channels, "out")
    if a["bias"] is not None:
        t.freeze(channels, "standardised filters with a shift")
        freeze_all(t, "standardised filters with a shift", a["bias"])
    t.set_view(out, View(view.name, view.dims, "standard"))
    t.closed = True
    return True


def weight_norm(t: Tracer, a: Args, out: Any) -> None:
    """``g * v / |v|`` by filters: a zero gain silences one, a zero filter would divide by zero."""
    v, g = t.view(a["v"]), t.view(a["g"])
    if t.gated or v is None or g is None or a["dim"] != 0 or v.dims[0] != 0 or v.kind:
        return
    t.labels.unite(t.claim(a["v"], 0, "state"), t.claim(a["g"], 0, "out"))
    t.set_view(out[0], View(v.name, v.dims, "normed"))


def scales(t: Tracer, x: Any, factor: Any, out: Tensor) -> bool:
    """A weight times a number, or over one that was computed from it (spectral norm)."""
    view = t.view(x)
    one = isinstance(factor, (int, float)) or (
        isinstance(factor, Tensor) and factor.numel() == 1 and t.view(factor) is None
    )
    wide = isinstance(x, Tensor) and sum(size > 1 for size in x.shape) > 1
    if t.gated or view is None or view.kind or not one or not wide or out.shape != x.shape:
        return False
    t.keep_view(x)
    t.set_view(out, View(view.name, view.dims, "scaled"))
    return True


def matrix_vector(t: Tracer, a: Args, out: Tensor) -> None:
    """A weight as rows of filters times a buffer, as in power iteration: zeros add nothing."""
    view, vector = t.view(a["self"]), t.view(a["vec"])
    if t.gated or view is None or vector is None or view.kind:
        return
    if view.dims not in ((0, MERGED), (0, 1)) or vector.dims != (0,):
        return
    reads = t.side(view.name, 1, "cut").repeat_interleave(math.prod(t.shapes[view.name][2:]))
    t.labels.unite(t.claim(a["vec"], 0, "state"), reads)
    t.set(out, t.claim(a["self"], 0, "out"))


def inner_product(t: Tracer, a: Args, out: Tensor) -> None:
    """A sum over channels of products, of which one factor is zero where the channel is."""
    x, y = a["self"], a["other"] if "other" in a else a["tensor"]
    labels = t.get(y)
    if t.view(x) is None or labels is None:
        return
    t.settle(labels)
    t.labels.unite(t.claim(x, 0, "state"), labels)
    t.closed = True
