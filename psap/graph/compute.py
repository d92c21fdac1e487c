"""Rules of convolutions, linear layers and batch norms: they read channels and give new ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from psap.graph.attention import product
from psap.graph.common import along, channels_along, computed, first, freeze_all
from psap.graph.labels import plain
from psap.graph.trace import Args, Tracer, View
from psap.graph.weights import rescaled, standardises, tie_computed


def _consume(t: Tracer, x: Tensor, dim: int, weight: Tensor, weight_dim: int, op: str) -> None:
    """Tie the channels of ``x`` to the input side of a weight."""
    labels = t.get(x)
    side = _reads(t, weight, weight_dim, labels, along(x, labels, dim))
    if labels is None:
        t.freeze(side, "reads data that has no channels to prune")
        return
    channels = channels_along(t, x, labels, dim, op)
    if channels is None:
        t.freeze(side, f"reads channels that {op} cannot lose")
    else:
        t.labels.unite(channels, side)


def _reads(
    t: Tracer, weight: Tensor, dim: int, labels: Tensor | None, like: Tensor | None = None
) -> Tensor:
    """The side of a weight that reads these labels.

    Standardised filters count what they read: it must be zero in the masked weights, too; what they
    read must be zero all the same, since zeros do not stay zero when a mean is subtracted.
    """
    view = t.view(weight)
    if view is None or view.kind != "standard" or t.shapes[view.name][view.dims[dim]] == 1:
        role = "in" if labels is None else t.reading(labels)
        if like is not None and (role == "cut" or t.gated):
            like = plain(like)
        return t.claim(weight, dim, role, like)
    if labels is not None:
        t.settle(labels)
    side = t.claim(weight, dim, "in" if t.gated else "cut")
    if t.gated:
        t.freeze(side, "weight standardisation over it: its statistics would change")
    else:
        t.count_channels(side)
    return side


def convolution(t: Tracer, a: Args, out: Tensor) -> None:
    """Read channels on one side of the weight, give those of the other side."""
    x, weight, bias, groups = a["input"], a["weight"], a["bias"], int(a["groups"])
    view = t.view(weight)
    positions = x.numel() // x.shape[1] if a["transposed"] else out.numel() // out.shape[1]
    if view is None:
        freeze_all(t, "the weight of a convolution is computed in forward", x)
        t.fixed_macs += float(positions * weight.numel()) if t.counting else 0
        return
    t.count(view.name, float(positions), float(out.numel()))
    if _slides(t, a, view, out):
        return
    reads, gives = (0, 1) if a["transposed"] else (1, 0)
    if groups > 1:
        labels = (_grouped_back if a["transposed"] else _grouped)(t, x, weight, groups)
        if labels is None:
            why = "a grouped convolution of data that has no channels to prune"
            freeze_all(t, why, x)
            t.freeze_parameter(view, why)
            return
    else:
        _consume(t, x, 1, weight, reads, "convolution")
        labels = t.claim(weight, gives, "out")
    if bias is not None and t.view(bias) is not None:
        t.labels.unite(t.claim(bias, 0, "out", labels), labels)
    elif bias is not None:
        t.freeze(labels, "a bias that is computed in forward")
    t.made_by(out, view.name)
    t.set(out, labels.view(1, -1, *[1] * (out.dim() - 2)))


def _slides(t: Tracer, a: Args, view: View, out: Tensor) -> bool:
    """One filter that slides over the channels (ECA): what is pruned stays as a zero between them.

    Graph mode puts the zeros back, and takes the kept positions of the result.
    """
    x, weight = a["input"], a["weight"]
    labels = t.get(x)
    along = [] if labels is None else [d for d in range(2, labels.dim()) if labels.shape[d] > 1]
    if labels is None or t.gated or len(along) != 1 or labels.shape[1] > 1:
        return False
    if tuple(weight.shape[:2]) != (1, 1) or out.shape[along[0]] != x.shape[along[0]]:
        return False
    t.settle(labels)
    t.count_channels(labels)
    t.freeze_parameter(view, "slides over the channels")
    t.keep_view(weight)
    t.keep_view(a["bias"])
    if a["bias"] is not None and t.view(a["bias"]) is None:
        freeze_all(t, "a bias that is computed in forward", a["bias"])
    t.set(out, t.taint(labels, "a convolution that slides over the channels"))
    return True


def _grouped(t: Tracer, x: Tensor, weight: Tensor, groups: int) -> Tensor | None:
    """Tie the channels of all convolution groups at the same offset; depthwise ones follow x."""
    labels = t.get(x)
    like = along(x, labels, 1) if weight.shape[1] == 1 else None
    gives = t.claim(weight, 0, "out", None if like is None else plain(like))
    if labels is None:
        return None
    channels = channels_along(t, x, labels, 1, "grouped convolution")
    if channels is None:
        return None
    if weight.shape[1] == 1:  # a filter that is zero gives zero whatever it reads
        _alone(t, weight)
        times = weight.shape[0] // groups
        t.labels.unite(channels if times == 1 else channels.repeat_interleave(times), gives)
        return gives
    by_group = channels.view(groups, -1)
    t.labels.unite(by_group, _reads(t, weight, 1, labels))
    rows = gives.view(groups, -1)
    t.labels.unite(rows, rows[0])
    return gives


def _alone(t: Tracer, weight: Tensor) -> None:
    """The side of size 1 of depthwise filters, one and the same for all of them."""
    if t.single is None:
        t.single = t.labels.new(1)
        t.labels.freeze(t.single, "depthwise")
    side = t.claim(weight, 1, "in", t.single)
    if side is not t.single:
        t.labels.freeze(side, "depthwise")


def _grouped_back(t: Tracer, x: Tensor, weight: Tensor, groups: int) -> Tensor | None:
    """The same for a transposed convolution, weight [in, out / groups, ...]."""
    labels = t.get(x)
    if labels is None:
        return None
    channels = channels_along(t, x, labels, 1, "grouped convolution")
    if channels is None:
        return None
    if weight.shape[0] == groups:
        t.labels.unite(channels, t.claim(weight, 0, "out"))
        _alone(t, weight)
        return channels.repeat_interleave(weight.shape[1])
    reads = _reads(t, weight, 0, labels)
    t.labels.unite(channels, reads)
    rows = reads.view(groups, -1)
    t.labels.unite(rows, rows[0])
    return t.claim(weight, 1, "out").repeat(groups)


def _product(t: Tracer, x: Tensor, weight: Tensor, bias: Any, out: Tensor) -> None:
    """``out = x @ weight (+ bias)`` with weight [in, out] a permuted parameter."""
    view = t.view(weight)
    if view is None and t.view(x) is None and x.dim() == 2 and bias is None:
        product(t, x, weight, out)
        return
    if view is None or weight.dim() != 2 or t.view(x) is not None:
        freeze_all(t, "a product of two activations", x, weight, bias)
        t.fixed_macs += out.numel() * x.shape[-1] if t.counting else 0
        return
    _consume(t, x, x.dim() - 1, weight, 0, "linear")
    labels = t.claim(weight, 1, "out")
    if isinstance(bias, Tensor) and t.view(bias) is not None:
        if bias.dim() == 1 and bias.shape == labels.shape:
            t.labels.unite(t.claim(bias, 0, "out", labels), labels)
        else:
            t.freeze(labels, "a bias of another shape than the output of linear")
    elif isinstance(bias, Tensor):
        _computed_bias(t, bias, labels)
    share = labels.numel() / t.shapes[view.name][view.dims[1]]
    t.count(view.name, share * out.numel() / out.shape[-1], float(out.numel()))
    t.made_by(out, view.name)
    t.set(out, labels)


def _computed_bias(t: Tracer, bias: Tensor, labels: Tensor) -> None:
    """A vector made of parameters, such as a part of one, goes with the outputs."""
    found = t.get(bias)
    if found is not None and found.shape == labels.shape == bias.shape:
        t.settle(found)
        t.labels.unite(found, labels)
        return
    t.freeze(labels, "a bias that is computed in forward")
    freeze_all(t, "added inside a matrix product", bias)


def mm(t: Tracer, a: Args, out: Tensor) -> None:
    """``self @ mat2``."""
    _product(t, a["self"], a["mat2"], None, out)


def addmm(t: Tracer, a: Args, out: Tensor) -> None:
    """``self + mat1 @ mat2`` with both factors one."""
    bias = a["self"]
    if a["beta"] != 1 or a["alpha"] != 1:
        freeze_all(t, "addmm with scaling", bias, a["mat1"], a["mat2"])
        return
    _product(t, a["mat1"], a["mat2"], bias, out)


def linear(t: Tracer, a: Args, out: Tensor) -> None:
    """``input @ weight.T + bias`` where it reaches the dispatcher whole."""
    weight = a["weight"]
    view = t.view(weight)
    if view is not None and weight.dim() == 2:
        flipped = weight.detach().t()
        t.set_view(flipped, replace(view, dims=view.dims[::-1]))
        weight = flipped
    _product(t, a["input"], weight, a["bias"], out)


def batch_norm(t: Tracer, a: Args, out: Any) -> None:
    """Per-channel statistics and an affine pair; a zeroed pair makes the channel zero."""
    x, y = a["input"], first(out)
    if t.view(x) is not None and standardises(t, a, y):
        return
    vectors = [a.get(key) for key in ("weight", "bias", "running_mean", "running_var")]
    labels = t.get(x)
    if labels is not None and any(t.get(v) is None for v in vectors if computed(t, v)):
        t.freeze(labels, "batch norm with vectors that are computed in forward")
        return
    channels = None if labels is None else channels_along(t, x, labels, 1, "batch norm")
    if labels is None or channels is None:
        for vector in vectors:
            if vector is not None and (view := t.view(vector)) is not None:
                t.freeze_parameter(view, "normalises data that has no channels to prune")
                t.keep_view(vector)
        return
    clean = plain(channels)
    for vector, role in zip(vectors, ("out", "out", "out", "state"), strict=True):
        if isinstance(vector, Tensor) and t.view(vector) is not None:
            t.labels.unite(t.claim(vector, 0, role, clean), clean)
        elif isinstance(vector, Tensor):
            tie_computed(t, t.get(vector), channels, role)
    weight = vectors[0]
    view = t.view(weight)
    if weight is not None and clean is not channels:
        labels = plain(labels)
    if view is not None:
        t.affine.update(v.name for v in map(t.view, vectors[:2]) if v is not None)
        source = t.origin(x)
        if source is not None:
            rescaled(t, source, weight)
    t.set(y, labels)
