"""abs_histogram: how often each magnitude occurs; abs_quantile: thresholds without a sort."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from psap_kernels import _backend, _checks, reference
from psap_kernels._library import register

MAX_BINS = 2048
_KEY_BITS = 31  # a float32 without its sign


def abs_histogram(
    tensors: Sequence[Tensor],
    *,
    scales: Tensor | None = None,
    first: int = 0,
    shift: int = 20,
    bins: int = MAX_BINS,
) -> Tensor:
    """Count the magnitudes of every tensor in bins of float32 bit patterns, in one pass.

    The key of an element x of tensor l is the bit pattern of float32(abs(x)) * scales[l] (one
    float32 product), an integer that grows with the value. Bin b holds the keys with
    ``(key - first) >> shift == b``: with the defaults, 8 bins for each power of two.

    Args:
        tensors: [...] each, float32, float64, bfloat16 or float16 (they may differ), any strides,
            on one device.
        scales: float32 [L], finite and >= 0, a factor for each tensor. None: 1.
        first: the key at which bin 0 begins, 0 to 2^31 - 1.
        shift: a bin is 2^shift keys wide, 0 to 30.
        bins: how many, 1 to 2048.

    Returns:
        int64 [L, bins + 2]: keys below ``first``; the bins; keys beyond them. The key of NaN is
        2^31 - 1, the largest.

    Raises:
        ValueError: a number is out of range, or a shape or device does not fit.
        TypeError: not tensors, or a dtype that is not supported.
    """
    if not isinstance(tensors, (list, tuple)):
        tensors = _checks.tensor_list("tensors", tensors)
    if scales is None:
        device = _backend.device_of(tensors)
        scales = torch.ones(len(tensors), dtype=torch.float32, device=device)
    arguments = (tensors, scales, first, shift, bins)
    counts: Tensor = _backend.run(
        "abs_histogram",
        tensors,
        arguments,
        lambda: _checks.histogram_arguments(
            _checks.tensor_list("tensors", tensors), scales, first, shift, bins
        ),
    )
    return counts


def abs_quantile(tensors: Sequence[Tensor], q: float, *, scales: Tensor | None = None) -> float:
    """Return the q-quantile of the magnitudes of all tensors together, exactly, without a sort.

    The smallest value v of float32(abs(x)) * scale such that at least ``q * n`` of the n values
    are <= v ("inverted_cdf" of numpy.quantile). Found in three passes of `abs_histogram`, 11 and
    twice 10 bits of the answer at a time. NaN counts as larger than infinity.

    Args:
        tensors: as for `abs_histogram`, not all of them empty.
        q: 0 to 1.
        scales: float32 [L], a factor for each tensor. None: 1.

    Returns:
        The quantile, a float32 value as a Python float.

    Raises:
        ValueError: q is out of range, there is no element, or see `abs_histogram`.
        TypeError: q is not a number, or see `abs_histogram`.
    """
    if not isinstance(q, Real):
        raise TypeError(f"q is a {type(q).__name__}, wanted a number from 0 to 1")
    q = float(q)  # a rank would be rounded in anything narrower
    if not 0 <= q <= 1:
        raise ValueError(f"q is {q!r}, wanted 0 <= q <= 1")
    tensors = _checks.tensor_list("tensors", tensors)
    total = sum(tensor.numel() for tensor in tensors)
    if total == 0:
        raise ValueError("tensors hold no element, wanted at least one: a quantile of nothing")
    rank = max(1, math.ceil(q * total))  # the answer is the rank-th smallest value
    first = 0
    for shift, bins in ((20, 2048), (10, 1024), (0, 1024)):
        counts = abs_histogram(tensors, scales=scales, first=first, shift=shift, bins=bins)
        upto = counts.sum(0).cumsum(0)
        column = int((upto >= rank).nonzero()[0, 0])
        first += (column - 1) << shift
    value: float = struct.unpack("f", struct.pack("i", first))[0]
    return value


def _fake(tensors: list[Tensor], scales: Tensor, first: int, shift: int, bins: int) -> Tensor:
    _checks.one_device(tensors, [scales])
    return scales.new_empty((len(tensors), bins + 2), dtype=torch.int64)


register("abs_histogram", reference=reference.abs_histogram, fake=_fake)
