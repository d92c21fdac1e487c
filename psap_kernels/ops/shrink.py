"""shrink: gather the kept filters and input channels of many tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from psap_kernels import _backend, _checks, reference
from psap_kernels._library import register


def shrink(
    tensors: Sequence[Tensor],
    keep_dim0: Sequence[Tensor | None],
    keep_dim1: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """Return ``tensors[t][keep_dim0[t]][:, keep_dim1[t]]`` for every tensor, in one pass.

    Args:
        tensors: [O, I, ...] or [O] each, any dtype and strides, on one device.
        keep_dim0: int64 indices into dimension 0 for each tensor, in any order, duplicates
            allowed; None keeps all of it.
        keep_dim1: the same for dimension 1; None as a whole keeps all input channels. Ignored for
            tensors of one dimension.

    Returns:
        New tensors [len(keep_dim0[t]), len(keep_dim1[t]), ...] that share no memory with
        ``tensors``: channels_last where the input is, contiguous otherwise.

    Raises:
        ValueError: an index is out of range, or a shape, list length or device does not fit.
        TypeError: not tensors, or indices that are not int64.
    """
    if not isinstance(tensors, (list, tuple)):
        tensors = _checks.tensor_list("tensors", tensors)
    keep_dim0 = _filled(keep_dim0, tensors, dim=0)
    keep_dim1 = _filled([None] * len(tensors) if keep_dim1 is None else keep_dim1, tensors, dim=1)
    arguments = (tensors, keep_dim0, keep_dim1)
    outputs: list[Tensor] = _backend.run(
        "shrink", tensors, arguments, lambda: _check(tensors, keep_dim0, keep_dim1)
    )
    return outputs


def _filled(keep: Sequence[Tensor | None], tensors: Sequence[Tensor], *, dim: int) -> Any:
    """None becomes 0, 1, ... size - 1, which a kernel copies as a block; all else stays as it is.

    One arange serves all: the shorter lists are views of it, one for every size.
    """
    if not isinstance(keep, (list, tuple)) or all(index is not None for index in keep):
        return keep
    if len(keep) != len(tensors) or not all(isinstance(tensor, Tensor) for tensor in tensors):
        return keep  # the checks will say so
    shapes = [tensor.shape for tensor in tensors]
    sizes = [shape[dim] if len(shape) > dim else 0 for shape in shapes]
    everything = torch.arange(max(sizes), device=_backend.device_of(tensors))
    views = {size: everything[:size] for size in set(sizes)}
    return [
        views[size] if index is None else index for index, size in zip(keep, sizes, strict=True)
    ]


def _check(tensors: Any, keep_dim0: Any, keep_dim1: Any) -> None:
    tensors = _checks.tensor_list("tensors", tensors)
    _checks.filters("tensors", tensors)
    for dim, keep in enumerate((keep_dim0, keep_dim1)):
        name = f"keep_dim{dim}"
        lists = _checks.tensor_list(name, keep, length=len(tensors))
        used = {i: index for i, index in enumerate(lists) if tensors[i].dim() > dim}
        for i, index in used.items():
            _checks.index_list(name, i, index, tensors[0].device)
        _checks.index_ranges(name, used, {i: tensors[i].shape[dim] for i in used})


def _fake(tensors: list[Tensor], keep_dim0: list[Tensor], keep_dim1: list[Tensor]) -> list[Tensor]:
    _checks.one_device(tensors, keep_dim0, keep_dim1)
    outputs = []
    for tensor, keep0, keep1 in zip(tensors, keep_dim0, keep_dim1, strict=True):
        kept = (keep0.shape[0], keep1.shape[0])[: tensor.dim()]
        outputs.append(
            torch.empty(
                (*kept, *tensor.shape[2:]),
                dtype=tensor.dtype,
                device=tensor.device,
                memory_format=reference.memory_format(tensor),
            )
        )
    return outputs


register("shrink", reference=reference.shrink, fake=_fake)
