"""zero_filters_: set whole filters to exact zero."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from psap_kernels import _backend, _checks, reference
from psap_kernels._library import register


def zero_filters_(tensors: Sequence[Tensor], keep: Sequence[Tensor]) -> None:
    """Set the filters that are not kept to zero, in place: ``tensors[t][~keep[t]] = 0``.

    NaN and Inf are cleared too; kept filters are not touched. Parameters that require grad are
    fine: nothing is recorded.

    Args:
        tensors: [O, ...] each, any dtype and strides, on one device.
        keep: bool [O] for each tensor.

    Raises:
        ValueError: a shape, the number of masks or a device does not fit; an expanded tensor.
        TypeError: not tensors, or a mask that is not bool.
    """
    arguments = (tensors, keep)
    _backend.run("zero_filters_", tensors, arguments, lambda: _check(*arguments))


def _check(tensors: Sequence[Tensor], keep: Sequence[Tensor]) -> None:
    tensors = _checks.tensor_list("tensors", tensors)
    _checks.zero_arguments(tensors, _checks.tensor_list("keep", keep, length=len(tensors)))


def _fake(tensors: list[Tensor], keep: list[Tensor]) -> None:
    _checks.one_device(tensors, keep)


register("zero_filters_", reference=reference.zero_filters_, fake=_fake)
