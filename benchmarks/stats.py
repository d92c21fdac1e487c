"""layer_stats: weights and gradients of all layers read once, against eager PyTorch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import psap_kernels
from benchmarks import limits, shapes, tensors
from benchmarks.registry import Case, Options, register

TAU = 0.01
ERROR = 5e-7  # against float64, relative to the magnitudes added: sums are float32
FOREACH_ELEMENTS = 200_000_000  # _foreach_* holds copies of the whole network


def naive(weights: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """The formulas as they stand, each on its own."""
    out = []
    for w, g in zip(map(tensors.rows, weights), map(tensors.rows, grads), strict=True):
        out += [w.abs().sum(1), (w * w).sum(1), g.abs().sum(1), (g * g).sum(1)]
        out += [(w * g).abs().sum(1), (w * g).sum(1), (w.abs() < TAU).sum(1)]
        out += [(~w.isfinite()).sum(1), (~g.isfinite()).sum(1), w.sum()]
    return out


def tuned(weights: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """The fastest calls that were found for every statistic.

    Counts are float sums, since integer sums of booleans take three times as long; non-finite
    values are counted only if a sum shows that there are any.
    """
    norm = torch.linalg.vector_norm
    out, sums = [], []
    for w, g in zip(map(tensors.rows, weights), map(tensors.rows, grads), strict=True):
        wg, size = w * g, w.abs()
        out += [size.sum(1), norm(w, 2, 1), g.abs().sum(1), norm(g, 2, 1), wg.sum(1)]
        out += [wg.abs_().sum(1), torch.lt(size, TAU, out=torch.empty_like(w)).sum(1)]
        sums += [w.sum(1), g.sum(1)]
    if weights[0].is_meta or bool(torch.cat(sums).isfinite().all()):
        return out + sums
    return out + [torch.count_nonzero(~tensors.rows(x).isfinite(), 1) for x in (*weights, *grads)]


def foreach(weights: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Element-wise work in one call for all layers; there are no reductions by row to go with."""
    w, g = list(map(tensors.rows, weights)), list(map(tensors.rows, grads))
    wg = torch._foreach_mul(w, g)
    whole = [torch._foreach_abs(x) for x in (w, g, wg)]
    whole += [torch._foreach_mul(w, w), torch._foreach_mul(g, g), wg]
    out = [x.sum(1) for xs in whole for x in xs]
    out += [torch.count_nonzero(x < TAU, 1) for x in whole[0]]
    out += [torch.count_nonzero(~torch.isfinite(x), 1) for xs in (w, g) for x in xs]
    return [*out, *(x.sum() for x in w)]


def fault(weights: list[Tensor], grads: list[Tensor], tau: Tensor) -> str | None:
    """Compare with float64, filter by filter; counts exactly."""
    stats = psap_kernels.layer_stats(weights, grads, tau=tau)
    for i, (weight, grad) in enumerate(zip(weights, grads, strict=True)):
        w, g = tensors.rows(weight).double(), tensors.rows(grad).double()
        terms = [w.abs(), w * w, g.abs(), g * g, (w * g).abs(), w * g]
        want = torch.stack([t.sum(1) for t in terms])
        magnitude = torch.stack([t.abs().sum(1) for t in terms])
        got = stats.layer(i)
        error = ((got.filter_sums - want).abs() / magnitude.clamp_min(1e-30)).max().item()
        if not error <= ERROR:
            return f"a sum of layer {i} is off by {error:.2g}, allowed {ERROR:.2g}"
        below = (w.abs() < tau[i].double()).sum(1)
        if not torch.equal(got.filter_counts[0].long(), below) or got.filter_counts[1:].any():
            return f"a count of layer {i} is wrong"
    return None


@register("stats")
def cases(options: Options, device: torch.device, threads: int) -> Iterator[Case]:
    """Every network in every dtype, weights and gradients."""
    for name in options.names():
        network = shapes.network(name)
        for dtype in options.dtype:
            w, g = (tensors.like_weights(network, dtype, device) for _ in range(2))
            yield _case(network, dtype, w, g, threads, options)


def _case(
    network: shapes.Network,
    dtype: str,
    w: list[Tensor],
    g: list[Tensor],
    threads: int,
    options: Options,
) -> Case:
    tau = torch.full((len(w),), TAU, device=w[0].device)
    baselines = {"naive": lambda: naive(w, g), "tuned": lambda: tuned(w, g)}
    if network.parameters <= FOREACH_ELEMENTS:
        baselines["foreach"] = lambda: foreach(w, g)
    if options.compile:
        baselines["compile"] = tensors.compiled(lambda: naive(w, g))
    return Case(
        op="layer_stats",
        name=network.name,
        shape=tensors.summary(network),
        dtype=dtype,
        bytes=tensors.size(w, g),
        fused=lambda: psap_kernels.layer_stats(w, g, tau=tau),
        verify=lambda: fault(w, g, tau),
        baselines=baselines,
        limit=limits.read([*w, *g], threads),
    )
