"""abs_histogram in Triton: how often each magnitude occurs, by the bits of float32(|x|) * scale.

Fused: conversion, product, bin and count of all tensors, one launch for each dtype. A program
counts PIECE elements in registers and shared memory, and adds what it found to the result by
integer atomics: the sum is the same in any order. Reads every element once (a tensor that is not
dense is copied first); writes 8 bytes a bin, which torch has zeroed. NaN has the key 2^31 - 1.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from psap_kernels.triton import _tables
from psap_kernels.triton._tables import elements, length_of

PIECE = 32768
BLOCK = 2048
# A row of the table: address, elements, whether both are whole vectors, first program, tensor.
COLUMNS = 5


@triton.jit
def _count_block(
    x, left, scale, first, shift, bins, found, below, beyond,
    BLOCK: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, BLOCK)
    inside = lane < left
    value = tl.abs(tl.abs(tl.load(x + lane, mask=inside, other=0).to(tl.float32)) * scale)
    key = tl.where(value == value, value.to(tl.int32, bitcast=True), 0x7FFFFFFF)
    column = (key - first) >> shift
    low = inside & (key < first)
    high = inside & (key >= first) & (column >= bins)
    binned = inside & (key >= first) & (column < bins)
    # What is in no bin is counted in bin 0 and taken out again: no spare bin, no mask.
    found += tl.histogram(tl.where(binned, column, 0), BINS)
    return found, below + low.to(tl.int32), beyond + high.to(tl.int32)


@triton.jit
def _count_piece(
    at, count, scale, first, shift, bins, counts,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    x = elements(at, DTYPE, VECTOR)
    length = length_of(count, VECTOR)
    found = tl.full((BINS,), 0, tl.int32)
    low = tl.full((BLOCK,), 0, tl.int32)
    high = tl.full((BLOCK,), 0, tl.int32)
    for i in range(0, length, BLOCK):
        found, low, high = _count_block(
            x + i, length - i, scale, first, shift, bins, found, low, high, BLOCK, BINS
        )
    below = tl.sum(low)
    beyond = tl.sum(high)
    read = tl.cdiv(length, BLOCK) * BLOCK
    bin = tl.arange(0, BINS)
    in_bins = length - below - beyond
    found -= tl.where(bin == 0, read - in_bins, 0)
    tl.atomic_add(counts + 1 + bin, found.to(tl.int64), mask=(found > 0) & (bin < bins),
                  sem="relaxed")  # fmt: skip
    tl.atomic_add(counts, below.to(tl.int64), sem="relaxed")
    tl.atomic_add(counts + bins + 1, beyond.to(tl.int64), sem="relaxed")


@triton.jit(do_not_specialize=["scales_stride", "first", "shift", "bins"])
def _histogram_kernel(
    table, programs, scales, scales_stride, counts, first, shift, bins,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr, PIECE: tl.constexpr,
    VECTOR: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = table + tl.load(programs + program).to(tl.int64) * COLUMNS
    begin = (program - tl.load(row + 3)) * PIECE
    length = tl.minimum(tl.load(row + 1) - begin, PIECE)
    tensor = tl.load(row + 4)
    scale = tl.load(scales + tensor * scales_stride)
    x = tl.load(row) + begin * (DTYPE.primitive_bitwidth // 8)
    out = counts + tensor * (bins + 2)
    if tl.load(row + 2) != 0:
        _count_piece(x, length, scale, first, shift, bins, out, DTYPE, BLOCK, BINS, VECTOR)
    else:
        _count_piece(x, length, scale, first, shift, bins, out, DTYPE, BLOCK, BINS, 1)


class _Tensor(NamedTuple):
    dtype: torch.dtype
    address: int
    length: int


def constants(dtype: torch.dtype, bins: int) -> dict[str, object]:
    """The compile-time arguments; few values of BINS, so that few kernels are compiled."""
    return {
        "DTYPE": _tables.ELEMENTS[dtype],
        "BLOCK": BLOCK,
        "BINS": max(128, 1 << (bins - 1).bit_length()),
        "PIECE": PIECE,
        "VECTOR": _tables.VECTOR_BYTES // dtype.itemsize,
        "COLUMNS": COLUMNS,
    }


@lru_cache(maxsize=64)
def _plan(
    tensors: tuple[_Tensor, ...], device: torch.device
) -> list[tuple[torch.dtype, Tensor, Tensor]]:
    launches = []
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors if tensor.length):
        rows: list[int] = []
        counts: list[int] = []
        for i, tensor in enumerate(tensors):
            if tensor.dtype != dtype or not tensor.length:
                continue
            whole = _tables.aligned(tensor.address, tensor.length * dtype.itemsize)
            rows += [tensor.address, tensor.length, whole, sum(counts), i]
            counts.append(_tables.ceil_div(tensor.length, PIECE))
        table = _tables.upload(tuple(rows), device)
        launches.append((dtype, table, _tables.program_map(tuple(counts), device)))
    return launches


def _check(tensors: list[Tensor], scales: Tensor, first: int, shift: int, bins: int) -> None:
    op = "abs_histogram"
    _tables.one_device(op, tensors, [scales])
    fits = scales.dtype == torch.float32 and scales.shape == (len(tensors),)
    _tables.want(fits, op, "scales must be float32 [L]")
    _tables.want(0 <= first < 2**31, op, "first must be 0 to 2^31 - 1")
    _tables.want(0 <= shift <= 30, op, "shift must be 0 to 30")
    _tables.want(1 <= bins <= 2048, op, "bins must be 1 to 2048")
    for tensor in tensors:
        _tables.want(tensor.dtype in _tables.ELEMENTS, op, "tensors must be of a float dtype")


def abs_histogram(
    tensors: list[Tensor], scales: Tensor, first: int, shift: int, bins: int
) -> Tensor:
    """Count the magnitudes of every tensor; see the schema."""
    _check(tensors, scales, first, shift, bins)
    device = scales.device
    flat = [t if _tables.dense(t.shape, t.stride()) else t.contiguous() for t in tensors]
    counts = torch.zeros((len(flat), bins + 2), dtype=torch.int64, device=device)
    plan = _plan(tuple(_Tensor(t.dtype, t.data_ptr(), t.numel()) for t in flat), device)
    stride = scales.stride(0)
    with _tables.on(device, *(table for launch in plan for table in launch[1:])):
        for dtype, table, programs in plan:
            _histogram_kernel[(len(programs),)](
                table, programs, scales, stride, counts, first, shift, bins,
                **constants(dtype, bins), **_tables.OPTIONS,
            )  # fmt: skip
    return counts
