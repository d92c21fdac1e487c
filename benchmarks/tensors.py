"""Tensors of the networks, and helpers that the baselines share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.registry import DTYPES
from benchmarks.timing import Run


def like_weights(network: shapes.Network, dtype: str, device: torch.device) -> list[Tensor]:
    """A random tensor for every convolution; call it again for gradients or momentum."""
    found = []
    for shape in network.convs:
        tensor = torch.randn(shape, device=device).mul_(0.02).to(DTYPES[dtype])
        if dtype == "channels_last":
            tensor = tensor.to(memory_format=torch.channels_last)
        found.append(tensor)
    return found


def rows(tensor: Tensor) -> Tensor:
    """[O, ...] -> [O, n] as a view, in the order of memory: what a careful user would reduce."""
    if tensor.dim() == 4 and not tensor.is_contiguous():
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.flatten(1)


def size(*lists: Sequence[Tensor]) -> int:
    """Bytes of all tensors."""
    return sum(tensor.nbytes for tensors in lists for tensor in tensors)


def summary(network: shapes.Network) -> str:
    """The sizes in words."""
    return f"{len(network.convs)} layers, {network.parameters / 1e6:.3g} M weights"


def half(n: int, generator: torch.Generator) -> Tensor:
    """Half of n positions at random, ascending, at least one; on the CPU."""
    return torch.randperm(n, generator=generator)[: max(1, n // 2)].sort().values


def keeps(tensors: Sequence[Tensor], dim: int) -> list[Tensor]:
    """Half of the positions along a dimension of every tensor, on its device."""
    generator = torch.Generator().manual_seed(dim)
    return [half(t.shape[dim], generator).to(t.device) for t in tensors]


def compiled(run: Any) -> Run:
    """torch.compile of a function without arguments; compiled at the first, untimed, call."""
    result: Run = torch.compile(run, dynamic=False)
    return result
