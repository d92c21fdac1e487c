"""A pass whose values do not matter: convolutions, most of its time, are not computed.

Channel labels depend on shapes alone; but forward() may ask for a value, and branch on it. Then
`ValueAsked` ends the pass, and it must be run again with everything computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_ASKING = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})
ASKING = frozenset({"tolist", "numpy", "__array__", "__dlpack__", "data_ptr", "untyped_storage"})
"""Names of methods that hand out values without a call of ATen."""


class ValueAsked(BaseException):
    """Forward() asked for values; no Exception, so that it does not handle this itself."""


def skipping(func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    """Run an ATen call, but give zeros for a convolution.

    Raises:
        ValueAsked: the call makes values known, or may do so.
    """
    if func is torch.ops.aten.convolution.default and not kwargs:
        shape = _shape(*args)
        if shape is not None:
            return args[0].new_zeros(shape)
    if func.namespace != "aten" or not _ASKING.isdisjoint(func.tags):
        raise ValueAsked(f"{func} makes values known")
    return func(*args, **kwargs)


def _shape(
    x: Tensor,
    weight: Tensor,
    bias: Any,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> list[int] | None:
    """The shape of what a convolution gives; None if that may lie in memory in another order."""
    if not (x.is_contiguous() and weight.is_contiguous()):
        return None
    shape = [x.shape[0], weight.shape[1] * groups if transposed else weight.shape[0]]
    sizes = zip(
        x.shape[2:], weight.shape[2:], stride, padding, dilation, output_padding, strict=True
    )
    for size, kernel, step, pad, gap, more in sizes:
        reach = gap * (kernel - 1) - 2 * pad
        if transposed:
            shape.append((size - 1) * step + reach + more + 1)
        else:
            shape.append((size - reach - 1) // step + 1)
    return shape
