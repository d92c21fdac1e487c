"""gate_stats_ in Triton: running sums of the gate derivatives of all channels of a network.

  d[c] = scale * sum over the terms (k, i, j) of c of <values[k][i], grads[k][j]>
  if every d is finite: sums[0] += d, sums[1] += d^2, seen[0] += 1; else: seen[1] += 1
Two launches, since blocks cannot wait for each other: d and one flag a program, then the sums. The
host waits for nothing. Reads the rows that terms name once, 12 bytes a term, 4 a channel; writes
8 bytes a channel and reads and writes the sums. Rows of a few elements (affine pairs of norms) take
a thread a channel and products in float64; longer ones a program a channel, float32 lanes (float64
for float64) that go to float64 every FLUSH elements. Terms are added in their order.
A term out of range makes its d NaN, so that its observation is left out.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from psap_kernels.triton import _tables
from psap_kernels.triton._tables import elements, length_of

FLUSH = 8192
BLOCK = 512  # elements at a time of a long row
SHORT = 16  # rows of up to this many elements take a thread a channel
CHANNELS = 128
SUMS_BLOCK = 512
# A row of the table: addresses of value and gradient, elements of a row, bytes from row to row of
# both, rows of both, dtype, whether all these are whole vectors.
COLUMNS = 9
CODES = {dtype: code for code, dtype in enumerate(_tables.ELEMENTS)}


@triton.jit
def _valid(table, terms, t, pairs, inside, COLUMNS: tl.constexpr):
    """The table row and both rows of term t, and whether all are in range."""
    k = tl.load(terms + t * 3, mask=inside, other=-1)
    i = tl.load(terms + t * 3 + 1, mask=inside, other=-1).to(tl.int64)
    j = tl.load(terms + t * 3 + 2, mask=inside, other=-1).to(tl.int64)
    ok = inside & (k >= 0) & (k < pairs)
    row = table + tl.where(ok, k, 0).to(tl.int64) * COLUMNS
    ok = ok & (i >= 0) & (i < tl.load(row + 5, mask=ok, other=0))
    ok = ok & (j >= 0) & (j < tl.load(row + 6, mask=ok, other=0))
    tl.device_assert(ok | (inside == 0), "term out of range")
    return row, i, j, ok


@triton.jit
def _products(v, g, mask, DTYPE: tl.constexpr):
    x = tl.load(v.to(tl.pointer_type(DTYPE)), mask=mask, other=0).to(tl.float64)
    return x * tl.load(g.to(tl.pointer_type(DTYPE)), mask=mask, other=0).to(tl.float64)


@triton.jit
def _short_terms(
    table, terms, begin, end, pairs, longest,
    DTYPES: tl.constexpr, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    d = tl.full((CHANNELS,), 0, tl.float64)
    for s in range(0, tl.max(end - begin)):
        t = begin + s
        inside = t < end
        row, i, j, ok = _valid(table, terms, t, pairs, inside, COLUMNS)
        n = tl.load(row + 2, mask=ok, other=0)
        code = tl.load(row + 7, mask=ok, other=0)
        v = tl.load(row, mask=ok, other=0) + i * tl.load(row + 3, mask=ok, other=0)
        g = tl.load(row + 1, mask=ok, other=0) + j * tl.load(row + 4, mask=ok, other=0)
        dot = tl.full((CHANNELS,), 0, tl.float64)
        for e in range(0, longest):
            if DTYPES & 1:
                dot += _products(v + e * 4, g + e * 4, (e < n) & (code == 0), tl.float32)
            if DTYPES & 2:
                dot += _products(v + e * 8, g + e * 8, (e < n) & (code == 1), tl.float64)
            if DTYPES & 4:
                dot += _products(v + e * 2, g + e * 2, (e < n) & (code == 2), tl.bfloat16)
            if DTYPES & 8:
                dot += _products(v + e * 2, g + e * 2, (e < n) & (code == 3), tl.float16)
        d += tl.where(inside, tl.where(ok, dot, float("nan")), 0)
    return d


@triton.jit
def _dot(
    v_at, g_at, count, DTYPE: tl.constexpr, ACC: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK: tl.constexpr, FLUSH: tl.constexpr,
):  # fmt: skip
    v = elements(v_at, DTYPE, VECTOR)
    g = elements(g_at, DTYPE, VECTOR)
    n = length_of(count, VECTOR)
    total = tl.full((), 0, tl.float64)
    lane = tl.arange(0, BLOCK)
    for start in range(0, n, FLUSH):
        acc = tl.full((BLOCK,), 0, ACC)
        for i in range(start, tl.minimum(start + FLUSH, n), BLOCK):
            inside = i + lane < n
            x = tl.load(v + i + lane, mask=inside, other=0).to(ACC)
            acc += x * tl.load(g + i + lane, mask=inside, other=0).to(ACC)
        total += tl.sum(acc).to(tl.float64)
    return total


@triton.jit
def _dot_of(
    v, g, n, whole, DTYPE: tl.constexpr, ACC: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK: tl.constexpr, FLUSH: tl.constexpr,
):  # fmt: skip
    total = tl.full((), 0, tl.float64)
    if whole != 0:
        total = _dot(v, g, n, DTYPE, ACC, VECTOR, BLOCK, FLUSH)
    else:
        total = _dot(v, g, n, DTYPE, ACC, 1, BLOCK, FLUSH)
    return total


@triton.jit
def _long_terms(
    table, terms, begin, end, pairs,
    DTYPES: tl.constexpr, BLOCK: tl.constexpr, FLUSH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    d = tl.full((), 0, tl.float64)
    for t in range(begin, end):
        row, i, j, ok = _valid(table, terms, t, pairs, t < end, COLUMNS)
        n = tl.load(row + 2, mask=ok, other=0)
        code = tl.load(row + 7)
        whole = tl.load(row + 8)
        v = tl.load(row) + i * tl.load(row + 3)
        g = tl.load(row + 1) + j * tl.load(row + 4)
        dot = tl.full((), 0, tl.float64)
        # Nested: only what is known when compiled leaves a body out.
        if DTYPES & 1:  # noqa: SIM102
            if code == 0:
                dot = _dot_of(v, g, n, whole, tl.float32, tl.float32, 4, BLOCK, FLUSH)
        if DTYPES & 2:  # noqa: SIM102
            if code == 1:
                dot = _dot_of(v, g, n, whole, tl.float64, tl.float64, 2, BLOCK, FLUSH)
        if DTYPES & 4:  # noqa: SIM102
            if code == 2:
                dot = _dot_of(v, g, n, whole, tl.bfloat16, tl.float32, 8, BLOCK * 2, FLUSH)
        if DTYPES & 8:  # noqa: SIM102
            if code == 3:
                dot = _dot_of(v, g, n, whole, tl.float16, tl.float32, 8, BLOCK * 2, FLUSH)
        d += tl.where(ok, dot, float("nan"))
    return d


@triton.jit(do_not_specialize=["pairs", "count", "channels", "longest", "scale_bits"])
def _derivatives_kernel(
    table, terms, offsets, derivatives, flags, pairs, count, channels, longest, scale_bits,
    DTYPES: tl.constexpr, LONG: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
    FLUSH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # The bits, since a Python float would arrive as float32.
    scale = scale_bits.to(tl.int64).to(tl.float64, bitcast=True)
    program = tl.program_id(0).to(tl.int64)
    if LONG:
        begin = tl.maximum(tl.load(offsets + program), 0)
        end = tl.minimum(tl.load(offsets + program + 1), count)
        d = _long_terms(table, terms, begin, end, pairs, DTYPES, BLOCK, FLUSH, COLUMNS) * scale
        tl.store(derivatives + program, d)
        tl.store(flags + program, tl.where(tl.abs(d) < float("inf"), 0, 1))
    else:
        c = program * CHANNELS + tl.arange(0, CHANNELS)
        inside = c < channels
        begin = tl.maximum(tl.load(offsets + c, mask=inside, other=0), 0)
        end = tl.minimum(tl.load(offsets + c + 1, mask=inside, other=0), count)
        d = _short_terms(
            table, terms, begin.to(tl.int64), end.to(tl.int64), pairs, longest,
            DTYPES, CHANNELS, COLUMNS,
        ) * scale  # fmt: skip
        tl.store(derivatives + c, d, mask=inside)
        wrong = tl.where(tl.abs(d) < float("inf"), 0, 1)  # 0 in lanes without a channel
        tl.store(flags + program, tl.max(wrong))


@triton.jit(do_not_specialize=["programs", "channels"])
def _add_kernel(
    sums, seen, derivatives, flags, programs, channels, BLOCK: tl.constexpr
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    wrong = tl.full((BLOCK,), 0, tl.int32)
    for i in range(0, programs, BLOCK):
        wrong |= tl.load(flags + i + lane, mask=i + lane < programs, other=0)
    finite = tl.max(wrong) == 0
    if program == 0:
        at = seen + tl.where(finite, 0, 1)
        tl.store(at, tl.load(at) + 1)
    if finite:
        c = program * BLOCK + lane
        inside = c < channels
        d = tl.load(derivatives + c, mask=inside, other=0)
        tl.store(sums + c, tl.load(sums + c, mask=inside) + d, mask=inside)
        at = sums + channels + c
        tl.store(at, tl.load(at, mask=inside) + d * d, mask=inside)


def constants(dtypes: list[torch.dtype], long: bool) -> dict[str, object]:
    """The compile-time arguments of the first launch."""
    return {
        "DTYPES": sum(1 << CODES[dtype] for dtype in dict.fromkeys(dtypes)),
        "LONG": long,
        "CHANNELS": CHANNELS,
        "BLOCK": BLOCK,
        "FLUSH": FLUSH,
        "COLUMNS": COLUMNS,
    }


class _Pair(NamedTuple):
    dtype: torch.dtype
    value: int
    grad: int
    length: int
    value_row: int
    grad_row: int
    values: int
    grads: int


@lru_cache(maxsize=64)
def _plan(pairs: tuple[_Pair, ...], device: torch.device) -> tuple[Tensor, dict[str, object], int]:
    numbers: list[int] = []
    for pair in pairs:
        sizes = (pair.value_row, pair.grad_row, pair.length * pair.dtype.itemsize)
        whole = _tables.aligned(pair.value, pair.grad, *sizes)
        numbers += [*pair[1:], CODES[pair.dtype], whole]
    longest = max([0, *(pair.length for pair in pairs)])
    kinds = constants([pair.dtype for pair in pairs], longest > SHORT)
    return _tables.upload(tuple(numbers), device), kinds, longest


def _check(
    sums: Tensor, seen: Tensor, values: list[Tensor], grads: list[Tensor], terms: Tensor,
    offsets: Tensor,
) -> None:  # fmt: skip
    op = "gate_stats_"
    _tables.one_device(op, [sums, seen, terms, offsets], values, grads)
    _tables.want(len(values) == len(grads), op, "as many grads as values are wanted")
    for tensor, dtype, shape in (
        (sums, torch.float64, (2, max(0, offsets.numel() - 1))),
        (seen, torch.int64, (2,)),
        (terms, torch.int32, (terms.shape[0] if terms.dim() else 0, 3)),
        (offsets, torch.int32, (max(1, offsets.numel()),)),
    ):
        fits = tensor.dtype == dtype and tensor.shape == shape and tensor.is_contiguous()
        _tables.want(fits, op, "sums, seen, terms or offsets have a wrong dtype or shape")
    for value, grad in zip(values, grads, strict=True):
        fits = value.dtype in _tables.ELEMENTS and value.dtype == grad.dtype
        _tables.want(fits, op, "values and grads must be of one float dtype")
        fits = 0 < value.dim() == grad.dim() and value.shape[1:] == grad.shape[1:]
        _tables.want(fits, op, "the rows of a gradient must be shaped like those of its value")
        _tables.want(value.shape[1:].numel() < 2**31 - FLUSH, op, "a row is too long")


def gate_stats_(
    sums: Tensor,
    seen: Tensor,
    values: list[Tensor],
    grads: list[Tensor],
    terms: Tensor,
    offsets: Tensor,
    scale: float,
) -> None:
    """Add one observation to the running sums; see the schema."""
    _check(sums, seen, values, grads, terms, offsets)
    v_dense = [_tables.dense_filters(v) for v in values]
    g_dense = [_tables.like_filters(g, v) for g, v in zip(grads, v_dense, strict=True)]
    pairs = tuple(
        _Pair(
            v.dtype, v.data_ptr(), g.data_ptr(), v.shape[1:].numel(), v.stride(0) * v.itemsize,
            g.stride(0) * g.itemsize, v.shape[0], g.shape[0],
        )
        for v, g in zip(v_dense, g_dense, strict=True)
    )  # fmt: skip
    table, kinds, longest = _plan(pairs, sums.device)
    channels = sums.shape[1]
    programs = channels if kinds["LONG"] else _tables.ceil_div(channels, CHANNELS)
    derivatives = sums.new_empty(channels)
    flags = sums.new_empty(programs, dtype=torch.int32)
    (scale_bits,) = struct.unpack("q", struct.pack("d", scale))
    with _tables.on(sums.device, table):
        if channels:
            _derivatives_kernel[(programs,)](
                table, terms, offsets, derivatives, flags, len(pairs), terms.shape[0], channels,
                longest, scale_bits, **kinds, **_tables.OPTIONS,
            )  # fmt: skip
        _add_kernel[(max(1, _tables.ceil_div(channels, SUMS_BLOCK)),)](
            sums, seen, derivatives, flags, programs, channels,
            BLOCK=SUMS_BLOCK, **_tables.OPTIONS,
        )  # fmt: skip
