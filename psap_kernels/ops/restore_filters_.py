"""restore_filters_: put saved filters back, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from psap_kernels import _backend, _checks, reference
from psap_kernels._library import register


def restore_filters_(
    tensors: Sequence[Tensor], rows: Sequence[Tensor], saved: Sequence[Tensor]
) -> None:
    """Write saved filters back in place: ``tensors[t][rows[t]] = saved[t]``, bit for bit.

    Parameters that require grad are fine: nothing is recorded. ``saved`` must not share memory
    with ``tensors`` (a copy by indexing, ``tensor[rows]``, does not).

    Args:
        tensors: [O, ...] each, any dtype and strides, on one device.
        rows: int64 [R] for each tensor, unique, in any order.
        saved: [R, ...] for each tensor, of its dtype.

    Raises:
        ValueError: a shape, a row index, a list length or a device does not fit; a row named
            twice; an expanded tensor.
        TypeError: not tensors, rows that are not int64, or saved rows of another dtype.
    """
    arguments = (tensors, rows, saved)
    _backend.run("restore_filters_", tensors, arguments, lambda: _check(*arguments))


def _check(tensors: Sequence[Tensor], rows: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
    tensors = _checks.tensor_list("tensors", tensors)
    rows = _checks.tensor_list("rows", rows, length=len(tensors))
    saved = _checks.tensor_list("saved", saved, length=len(tensors))
    _checks.restore_arguments(tensors, rows, saved)


def _fake(tensors: list[Tensor], rows: list[Tensor], saved: list[Tensor]) -> None:
    _checks.one_device(tensors, rows, saved)


register("restore_filters_", reference=reference.restore_filters_, fake=_fake)
