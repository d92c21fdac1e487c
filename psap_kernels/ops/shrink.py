"""shrink: gather the kept filters and input channels of many tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from psap_kernels import _checks, reference
from psap_kernels._backend import select
from psap_kernels._library import register


@torch.no_grad()
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
    tensors = _checks.tensor_list("tensors", tensors)
    _checks.filters("tensors", tensors)
    if keep_dim1 is None:
        keep_dim1 = [None] * len(tensors)
    keep_dim0 = _indices("keep_dim0", keep_dim0, tensors, dim=0)
    keep_dim1 = _indices("keep_dim1", keep_dim1, tensors, dim=1)
    if not tensors:
        return []
    op = select(torch.ops.psap.shrink.default, reference.shrink, tensors[0].device)
    outputs: list[Tensor] = op(tensors, keep_dim0, keep_dim1)
    return outputs


def _indices(
    name: str, keep: Sequence[Tensor | None], tensors: list[Tensor], *, dim: int
) -> list[Tensor]:
    """Check ``keep``; None becomes 0, 1, ... size - 1, which a kernel copies as a block."""
    sizes = [tensor.shape[dim] if tensor.dim() > dim else 0 for tensor in tensors]
    device = tensors[0].device if tensors else torch.device("cpu")
    full = _checks.optional_list(name, keep, sizes, device)
    given = {
        i: index for i, index in enumerate(full) if tensors[i].dim() > dim and keep[i] is not None
    }
    for i, index in given.items():
        _checks.index_list(name, i, index, device)
    _checks.index_ranges(name, given, dict(enumerate(sizes)))
    return full


def _fake(tensors: list[Tensor], keep_dim0: list[Tensor], keep_dim1: list[Tensor]) -> list[Tensor]:
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
