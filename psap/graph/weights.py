"""Rules of weights that forward() computes: standardised filters, weight norm, spectral norm.

The result is still the parameter, as a `View` of another kind, so convolutions find its sides.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from psap.graph.common import freeze_all
from psap.graph.trace import MERGED, Args, Tracer


def tie_computed(t: Tracer, labels: Tensor | None, channels: Tensor, role: str) -> None:
    """A vector that forward() makes from parameters, for example by repeating them."""
    if labels is None or labels.numel() not in (1, channels.numel()):
        t.freeze(channels, "batch norm with vectors that are computed in forward")
        return
    if role == "out":
        t.settle(labels)
    t.labels.unite(labels, channels)


def rescaled(t: Tracer, weight: str, gain: Any) -> None:
    """Note that filters are rescaled, by a norm of what they make or of their own."""
    view = t.view(gain) if isinstance(gain, Tensor) else None
    t.normalised.setdefault(weight, set()).update([] if view is None else [view.name])


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
    rescaled(t, view.name, gain)
    t.set_view(out, replace(view, kind="standard"))
    t.closed = True
    return True


def weight_norm(t: Tracer, a: Args, out: Any) -> None:
    """``g * v / |v|`` by filters: a zero gain silences one, a zero filter would divide by zero."""
    v, g = t.view(a["v"]), t.view(a["g"])
    if t.gated or v is None or g is None or a["dim"] != 0 or v.dims[0] != 0 or v.kind or v.rows:
        return
    t.labels.unite(t.claim(a["v"], 0, "state"), t.claim(a["g"], 0, "out"))
    t.set_view(out[0], replace(v, kind="normed"))


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
    t.set_view(out, replace(view, kind="scaled"))
    return True


def matrix_vector(t: Tracer, a: Args, out: Tensor) -> None:
    """A weight as rows of filters times a buffer, as in power iteration: zeros add nothing."""
    view, vector = t.view(a["self"]), t.view(a["vec"])
    if t.gated or view is None or vector is None or view.kind or view.rows:
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


CUTS = (torch.ops.aten.slice, torch.ops.aten.split, torch.ops.aten.split_with_sizes)


def rows(t: Tracer, a: Args, out: Any) -> bool:
    """Rows of a matrix of parameters; equal parts (queries, keys, values) lose the same ones."""
    x = next(iter(a.values()))
    view, parts = t.view(x), list(out) if isinstance(out, (tuple, list)) else [out]
    cuts = x.dim() == 2 and int(a.get("dim") or 0) in (0, -2) and a.get("step", 1) == 1
    if view is None or view.dims != (0, 1) or view.kind or view.rows or not cuts:
        return False
    if any(y.dim() != 2 or y.shape[1] != x.shape[1] for y in parts):
        return False
    start = int(a.get("start") or 0) % max(1, x.shape[0])
    sides = []
    for y in parts:
        t.set_view(y, replace(view, rows=(start, start + y.shape[0])))
        sides.append(t.claim(y, 0, "out"))
        start += y.shape[0]
    if len({side.shape for side in sides}) == 1 and len(sides) > 1:
        t.labels.unite(torch.stack(sides), sides[0])
    return True
