"""abs_histogram and abs_quantile: a threshold over the whole network without a sort."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import psap_kernels
from benchmarks import limits, shapes, tensors
from benchmarks.registry import Case, Options, register


@register("histogram")
def cases(options: Options, device: torch.device, threads: int) -> Iterator[Case]:
    """The counts, and the median of all magnitudes, of every network in every dtype."""
    for name in options.names():
        network = shapes.network(name)
        for dtype in options.dtype:
            w = tensors.like_weights(network, dtype, device)
            yield _histogram(network, dtype, w, threads)
            yield _quantile(network, dtype, w, threads)


def _histogram(network: shapes.Network, dtype: str, w: list[Tensor], threads: int) -> Case:
    def eager() -> Tensor:
        keys = [(x.float().abs().reshape(-1).view(torch.int32) >> 20) + 1 for x in w]
        return torch.stack([torch.bincount(k, minlength=2050) for k in keys])

    def fault() -> str | None:
        same = torch.equal(psap_kernels.abs_histogram(w), eager())
        return None if same else "the counts differ from those of bincount"

    return Case(
        op="abs_histogram",
        name=network.name,
        shape=tensors.summary(network),
        dtype=dtype,
        bytes=tensors.size(w),
        fused=lambda: psap_kernels.abs_histogram(w),
        verify=fault,
        baselines={"bincount": eager, "histc": lambda: [x.float().abs().histc(2048) for x in w]},
        limit=limits.read(w, threads),
    )


def _quantile(network: shapes.Network, dtype: str, w: list[Tensor], threads: int) -> Case:
    rank = (network.parameters + 1) // 2

    def flat() -> Tensor:
        return torch.cat([x.reshape(-1) for x in w]).abs()

    def fault() -> str | None:
        got, want = psap_kernels.abs_quantile(w, 0.5), flat().kthvalue(rank).values.item()
        return None if got == want else f"the median is {got}, kthvalue says {want}"

    return Case(
        op="abs_quantile",
        name=network.name,
        shape=tensors.summary(network),
        dtype=dtype,
        bytes=3 * tensors.size(w),
        fused=lambda: psap_kernels.abs_quantile(w, 0.5),
        verify=fault,
        baselines={
            "kthvalue": lambda: flat().kthvalue(rank).values.item(),
            "sort": lambda: flat().sort().values[rank - 1].item(),
        },
        limit=limits.read([*w, *w, *w], threads),
        capturable=False,
    )
