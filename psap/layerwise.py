"""What single layers give out, at a few positions: where two networks differ, what is silent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from psap.plans import Plan

LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding)
"""Modules whose channels are the last dimension of their output."""


@dataclass(frozen=True)
class Glimpse:
    """A part of one output of a module.

    Attributes:
        name: of the module.
        part: a few positions of it (see `few`), with all channels.
        axis: the dimension of its channels.
        shape: of the whole output.
        silent: whether the module has parameters, or is a norm, and gives the same for both inputs.
    """

    name: str
    part: Tensor
    axis: int
    shape: torch.Size
    silent: bool


@contextmanager
def glimpses(model: nn.Module, dense: nn.Module) -> Iterator[list[Glimpse]]:
    """Parts of the outputs of all modules without children, in order, while the block runs.

    Args:
        model: the dense model, or the small one.
        dense: the dense model, which says where a module has its channels.
    """
    found: list[Glimpse] = []
    leaves = {n: m for n, m in dense.named_modules() if not m._modules}
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            leaf = leaves.get(name)
            if leaf is not None:

                def note(
                    _: nn.Module, __: Any, out: Any, n: str = name, leaf: nn.Module = leaf
                ) -> None:
                    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
                        if glimpse := _glimpse(n, leaf, out):
                            found.append(glimpse)

                hooks.enter_context(module.register_forward_hook(note))
        yield found


def _glimpse(name: str, module: nn.Module, out: Any) -> Glimpse | None:
    plain = type(out) is Tensor and out.layout is torch.strided
    if not plain or not out.is_floating_point() or not out.dim():
        return None
    axis = _axis(module, out)
    part = few(out, axis)
    owner = bool(module._parameters) or isinstance(module, _NORM)
    same = owner and axis > 0 and all(map(silent, (part.flatten(1)[:, :128], part, out)))
    return Glimpse(name, part, axis, out.shape, same)


_NORM = nn.modules.batchnorm._NormBase


def _axis(module: nn.Module, out: Tensor) -> int:
    if isinstance(module, nn.modules.conv._ConvNd):
        return out.dim() - 1 - len(module.kernel_size)
    return out.dim() - 1 if isinstance(module, LAST) or out.dim() == 1 else 1


def few(out: Tensor, axis: int) -> Tensor:
    """A copy of few positions: two of dimension 0, four of others (of the last, in a row).

    Args:
        out: any tensor with a dimension.
        axis: the dimension that stays whole.
    """
    sizes, strides, start = list(out.shape), list(out.stride()), out.storage_offset()
    for dim, size in enumerate(out.shape):
        count = 4 if dim else 2
        if dim == axis or size <= count:
            continue
        sizes[dim] = count
        if dim == out.dim() - 1:
            start += (size - count) // 2 * strides[dim]
        elif dim:
            strides[dim] *= size // count
    return out.as_strided(sizes, strides, start).clone()


def silent(out: Tensor) -> bool:
    """Whether the first two positions of dimension 0 hold the same, apart from rounding."""
    if out.shape[0] < 2 or not out.numel():
        return False
    return _largest(out[1] - out[0]) <= 1e-12 * _largest(out[:2])


def _largest(x: Tensor) -> float:
    """The largest absolute value."""
    return float(torch.linalg.vector_norm(x, float("inf")))


def first_difference(
    wanted: list[Glimpse], got: list[Glimpse], plan: Plan, tolerance: float
) -> str | None:
    """The name of the first module whose kept outputs differ, where it is known which are kept.

    Args:
        wanted: of the masked dense network.
        got: of the small one.
        plan: says which outputs stay.
        tolerance: the largest difference relative to the largest output of the module. What is
            smaller than 1e-10 of the largest output so far may be rounding errors alone.
    """
    kept = _kept(plan)
    largest = 0.0
    for glimpse, other in _pairs(wanted, got):
        if plan.dropped and glimpse.shape != other.shape:
            return glimpse.name  # no channel goes with a branch
        part = _kept_part(glimpse, other, kept.get(glimpse.name, set()))
        if part is None or not part.numel():
            continue
        scale = _largest(part)
        if not scale < float("inf"):
            continue
        largest = max(largest, scale)
        if not _largest(part - other.part) <= max(tolerance * scale, 1e-10 * largest):
            return glimpse.name
    return None


def stopped_at(wanted: list[Glimpse], got: list[Glimpse]) -> str | None:
    """The name of the first module that the second run did not come to."""
    seen = {glimpse.name for glimpse in got}
    return next((glimpse.name for glimpse in wanted if glimpse.name not in seen), None)


def _pairs(wanted: list[Glimpse], got: list[Glimpse]) -> Iterator[tuple[Glimpse, Glimpse]]:
    """The same calls in both runs, of modules that were called as often in both."""
    times = Counter(glimpse.name for glimpse in wanted)
    calls: dict[str, list[Glimpse]] = {}
    for glimpse in got:
        calls.setdefault(glimpse.name, []).append(glimpse)
    left = {name: iter(found) for name, found in calls.items() if len(found) == times[name]}
    for glimpse in wanted:
        if glimpse.name in left:
            yield glimpse, next(left[glimpse.name])


def _kept(plan: Plan) -> dict[str, set[tuple[int, tuple[int, ...]]]]:
    """By module the size of what makes its channels, and the positions that stay."""
    kept: dict[str, set[tuple[int, tuple[int, ...]]]] = {}
    for side in plan.sides:
        if side.role not in ("in", "cut"):
            owner = side.name.rpartition(".")[0].partition(".parametrizations")[0]
            kept.setdefault(owner, set()).add((side.size, side.kept))
    return kept


def _kept_part(
    wanted: Glimpse, got: Glimpse, kept: set[tuple[int, tuple[int, ...]]]
) -> Tensor | None:
    """The kept channels of a dense output, or None if they are not known."""
    if wanted.shape == got.shape:
        return wanted.part
    axis, large, small = wanted.axis, list(wanted.shape), list(got.shape)
    fits = [k for size, k in kept if len(large) == len(small) and size == large[axis]]
    if len(fits) != 1 or small != [*large[:axis], len(fits[0]), *large[axis + 1 :]]:
        return None
    return wanted.part.index_select(axis, torch.tensor(fits[0], device=wanted.part.device))
