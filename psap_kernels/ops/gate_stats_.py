"""gate_stats_: running sums of gate derivatives, all channels of a network in one call."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from psap_kernels import _backend, _checks, reference
from psap_kernels._library import register


def gate_stats_(
    sums: Tensor,
    seen: Tensor,
    values: Sequence[Tensor],
    grads: Sequence[Tensor],
    terms: Tensor,
    offsets: Tensor,
    *,
    scale: float = 1.0,
) -> None:
    """Add the gate derivative of every channel, and its square, to running sums, in place.

    The derivative of the loss with respect to a gate on channel c is
    ``d[c] = scale * sum of <values[k][i], grads[k][j]>`` over the terms (k, i, j) of the channel:
    rows of affine pairs of batch norms, or of filters where no norm follows, with saved copies in
    the place of rows that are gated. If every d is finite, ``sums[0] += d``, ``sums[1] += d * d``
    and ``seen[0] += 1``; if one is not (an overflow of mixed precision), the whole observation is
    left out and ``seen[1] += 1``. Rows that no term names are not read.

    Args:
        sums: float64 [2, C], contiguous; written.
        seen: int64 [2], observations added and left out; written.
        values: [O, ...] each, float32, float64, bfloat16 or float16, any strides, on one device.
        grads: the gradient for each of ``values``, [P, ...] with the same row shape and dtype.
        terms: int32 [T, 3], contiguous: pair, row of the value, row of the gradient; sorted by
            channel.
        offsets: int32 [C + 1], contiguous, ascending from 0 to T: where each channel's terms are.
        scale: factor of every d, say 1 / loss scale.

    Raises:
        ValueError: a shape, an index, the number of tensors or a device does not fit.
        TypeError: not tensors, or a dtype that is not supported.
    """
    try:
        scale = float(scale)
    except (TypeError, ValueError):
        raise TypeError(f"scale is {scale!r}, wanted a number: 1 / loss scale, say") from None
    arguments = (sums, seen, values, grads, terms, offsets, scale)
    _backend.run("gate_stats_", [sums], arguments, lambda: _check(*arguments[:-1]))


def _check(
    sums: Tensor,
    seen: Tensor,
    values: Sequence[Tensor],
    grads: Sequence[Tensor],
    terms: Tensor,
    offsets: Tensor,
) -> None:
    for name, tensor in (("sums", sums), ("seen", seen), ("terms", terms), ("offsets", offsets)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}, wanted a tensor")
    values = _checks.tensor_list("values", values)
    grads = _checks.tensor_list("grads", grads, length=len(values))
    _checks.gate_arguments(sums, seen, values, grads, terms, offsets)


def _fake(
    sums: Tensor,
    seen: Tensor,
    values: list[Tensor],
    grads: list[Tensor],
    terms: Tensor,
    offsets: Tensor,
    scale: float,
) -> None:
    _checks.one_device([sums, seen, terms, offsets], values, grads)


register("gate_stats_", reference=reference.gate_stats_, fake=_fake)
