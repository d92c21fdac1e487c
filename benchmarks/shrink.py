"""shrink: half of the filters and of the input channels at random, weights and momentum."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import psap_kernels
from benchmarks import limits, shapes, tensors
from benchmarks.registry import Case, Options, register


@register("shrink")
def cases(options: Options, device: torch.device, _: int) -> Iterator[Case]:
    """Every network in every dtype."""
    for name in options.names():
        network = shapes.network(name)
        for dtype in options.dtype:
            whole = [t for _ in range(2) for t in tensors.like_weights(network, dtype, device)]
            yield _case(network, dtype, whole, options)


def _case(network: shapes.Network, dtype: str, whole: list[Tensor], options: Options) -> Case:
    first, second = tensors.keeps(whole, 0), tensors.keeps(whole, 1)

    def indexed() -> list[Tensor]:
        return [t[a][:, b] for t, a, b in zip(whole, first, second, strict=True)]

    def selected() -> list[Tensor]:
        return [
            t.index_select(0, a).index_select(1, b)
            for t, a, b in zip(whole, first, second, strict=True)
        ]

    def fused() -> list[Tensor]:
        return psap_kernels.shrink(whole, first, second)

    def fault() -> str | None:
        same = [torch.equal(a, b) for a, b in zip(fused(), selected(), strict=True)]
        return None if all(same) else f"tensor {same.index(False)} differs from index_select"

    outputs = fused()
    baselines = {
        "index twice": indexed,
        "index_select twice": selected,
        "clone of the output": lambda: [t.clone() for t in outputs],
    }
    if options.compile:
        baselines["compile"] = tensors.compiled(selected)
    return Case(
        op="shrink",
        name=network.name,
        shape=f"{tensors.summary(network)}, with momentum, half kept",
        dtype=dtype,
        bytes=2 * tensors.size(outputs) + tensors.size(first, second),
        fused=fused,
        verify=fault,
        baselines=baselines,
        limit=limits.copy(outputs),
        capturable=False,  # the ranges of the indices are looked at on the host
    )
