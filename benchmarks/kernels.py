"""Fused ops against tuned eager PyTorch, on the layers of real networks, one thread, CPU time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import psap_kernels
from benchmarks import rows
from psap.models import create

NETWORKS = ("resnet56", "vgg16_bn", "mobilenet_v2")
TAU = 0.01


def _eager_stats(weights: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """What one would write: a norm or a count per statistic, each the best single call."""
    out = []
    for w, g in zip(weights, grads, strict=True):
        w, g = w.flatten(1), g.flatten(1)
        wg = w * g
        out += [torch.linalg.vector_norm(x, 1, 1) for x in (w, g, wg)]
        out += [torch.linalg.vector_norm(x, 2, 1) for x in (w, g)]
        out += [wg.sum(1), torch.count_nonzero(w.abs() < TAU, 1)]
        out += [torch.count_nonzero(~torch.isfinite(x), 1) for x in (w, g)]
    return out


def _check_stats(weights: list[Tensor], grads: list[Tensor], tau: Tensor) -> None:
    stats = psap_kernels.layer_stats(weights, grads, tau=tau)
    exact = torch.cat(
        [(w.double() * g.double()).flatten(1).sum(1) for w, g in zip(weights, grads, strict=True)]
    )
    bound = torch.cat(
        [
            (w.double() * g.double()).abs().flatten(1).sum(1)
            for w, g in zip(weights, grads, strict=True)
        ]
    )
    if not bool(((stats.weight_grad.double() - exact).abs() <= 1e-6 * bound).all()):
        raise RuntimeError("layer_stats differs from the float64 oracle; nothing was timed")


def _stats(weights: list[Tensor]) -> dict[str, Callable[[], Any]]:
    grads = [torch.randn_like(w) for w in weights]
    tau = torch.full((len(weights),), TAU)
    _check_stats(weights, grads, tau)
    whole = [*weights, *grads]
    return {
        "fused": lambda: psap_kernels.layer_stats(weights, grads, tau=tau),
        "eager": lambda: _eager_stats(weights, grads),
        "read_once": lambda: [x.sum() for x in whole],
    }


def _shrink(weights: list[Tensor]) -> dict[str, Callable[[], Any]]:
    generator = torch.Generator().manual_seed(0)
    keeps = [
        [
            torch.randperm(n, generator=generator)[: max(1, n // 2)].sort().values
            for n in w.shape[:2]
        ]
        for w in weights
    ]
    first, second = [k[0] for k in keeps], [k[1] for k in keeps]

    def eager() -> list[Tensor]:
        return [
            w.index_select(0, a).index_select(1, b)
            for w, a, b in zip(weights, first, second, strict=True)
        ]

    fused = psap_kernels.shrink(weights, first, second)
    if not all(torch.equal(a, b) for a, b in zip(fused, eager(), strict=True)):
        raise RuntimeError("shrink differs from index_select; nothing was timed")
    return {"fused": lambda: psap_kernels.shrink(weights, first, second), "eager": eager}


def run(repeats: int = 21) -> None:
    """Time both ops on every network and write a row for each."""
    torch.set_num_threads(1)
    for network in NETWORKS:
        torch.manual_seed(0)
        model = create(network, num_classes=10, in_channels=3)
        weights = [p.detach() for p in model.parameters() if p.dim() == 4]
        for op, make in (("layer_stats", _stats), ("shrink", _shrink)):
            times = rows.cpu_ms(make(weights), repeats)
            rows.write(
                "kernels",
                {
                    "op": op,
                    "network": network,
                    "layers": len(weights),
                    "megabytes": sum(w.nbytes for w in weights) / 1e6,
                    "threads": 1,
                    "cpu_ms": times,
                    "eager_over_fused": times["eager"]["median"] / times["fused"]["median"],
                },
            )
