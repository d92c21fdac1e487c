"""The kernels of layer_stats: pieces of filters, then totals of layers and of split filters.

Their equations and costs are in layer_stats.py, which launches them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from psap_kernels.triton._tables import elements, length_of


@triton.jit
def _sum_piece(
    w_at, g_at, count, limit, DTYPE: tl.constexpr, ACC: tl.constexpr, GRADS: tl.constexpr,
    BLOCK: tl.constexpr, FLUSH: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    w = elements(w_at, DTYPE, VECTOR)
    g = elements(g_at, DTYPE, VECTOR)
    length = length_of(count, VECTOR)
    lane = tl.arange(0, BLOCK)
    none = tl.full((), 0.0, tl.float64)
    s0, s1, s2, s3, s4, s5, s6 = none, none, none, none, none, none, none
    below = tl.full((BLOCK,), 0, tl.int32)
    for start in range(0, length, FLUSH):
        zero = tl.full((BLOCK,), 0, ACC)
        w_abs, w_sq, w_sum = zero, zero, zero
        g_abs, g_sq, wg_abs, wg_sum = zero, zero, zero, zero
        for i in tl.range(start, tl.minimum(start + FLUSH, length), BLOCK, loop_unroll_factor=2):
            inside = i + lane < length
            x = tl.load(w + i + lane, mask=inside, other=0).to(ACC)
            magnitude = tl.abs(x)
            w_abs += magnitude
            w_sq += x * x
            w_sum += x
            below += ((magnitude < limit) & inside).to(tl.int32)
            if GRADS:
                y = tl.load(g + i + lane, mask=inside, other=0).to(ACC)
                g_abs += tl.abs(y)
                g_sq += y * y
                wg_abs += tl.abs(x * y)
                wg_sum += x * y
        s0 += tl.sum(w_abs).to(tl.float64)
        s1 += tl.sum(w_sq).to(tl.float64)
        s6 += tl.sum(w_sum).to(tl.float64)
        if GRADS:
            s2 += tl.sum(g_abs).to(tl.float64)
            s3 += tl.sum(g_sq).to(tl.float64)
            s4 += tl.sum(wg_abs).to(tl.float64)
            s5 += tl.sum(wg_sum).to(tl.float64)
    return s0, s1, s2, s3, s4, s5, s6, tl.sum(below)


@triton.jit
def _count_nonfinite(at, length, total, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    # A sum of magnitudes is not finite if one of them is not (or if it overflows): else skip.
    count = tl.full((), 0, tl.int32)
    finite = total < float("inf")
    if finite == 0:
        x = elements(at, DTYPE, 1)
        lane = tl.arange(0, BLOCK)
        wrong = tl.full((BLOCK,), 0, tl.int32)
        for i in range(0, length, BLOCK):
            v = tl.load(x + i + lane, mask=i + lane < length, other=0).to(tl.float64)
            wrong += tl.where(tl.abs(v) < float("inf"), 0, 1)
        count = tl.sum(wrong)
    return count


@triton.jit
def _store_filter(sums, counts, f, filters, s0, s1, s2, s3, s4, s5, c0, c1, c2):
    tl.store(sums + f, s0.to(tl.float32))
    tl.store(sums + f + filters, s1.to(tl.float32))
    tl.store(sums + f + filters * 2, s2.to(tl.float32))
    tl.store(sums + f + filters * 3, s3.to(tl.float32))
    tl.store(sums + f + filters * 4, s4.to(tl.float32))
    tl.store(sums + f + filters * 5, s5.to(tl.float32))
    tl.store(counts + f, c0)
    tl.store(counts + f + filters, c1)
    tl.store(counts + f + filters * 2, c2)


@triton.jit(do_not_specialize=["tau_stride", "filters", "pieces"])
def pieces_kernel(
    table, programs, tau, tau_stride, partial, filter_sums, filter_counts, filters, pieces,
    DTYPE: tl.constexpr, ACC: tl.constexpr, GRADS: tl.constexpr, BLOCK: tl.constexpr,
    FLUSH: tl.constexpr, VECTOR: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = table + tl.load(programs + program).to(tl.int64) * COLUMNS
    of_filter = tl.load(row + 6)
    piece = tl.load(row + 7)
    local = program - tl.load(row + 8)
    f = local // of_filter
    begin = (local - f * of_filter) * piece
    count = tl.minimum(tl.load(row + 4) - begin, piece)
    bytes_in: tl.constexpr = DTYPE.primitive_bitwidth // 8
    w_at = tl.load(row) + f * tl.load(row + 2) + begin * bytes_in
    g_at = tl.load(row + 1) + f * tl.load(row + 3) + begin * bytes_in
    layer = tl.load(row + 11)
    limit = tl.load(tau + layer * tau_stride).to(ACC)
    if tl.load(row + 5) != 0:
        s0, s1, s2, s3, s4, s5, s6, c0 = _sum_piece(
            w_at, g_at, count, limit, DTYPE, ACC, GRADS, BLOCK, FLUSH, VECTOR
        )
    else:
        s0, s1, s2, s3, s4, s5, s6, c0 = _sum_piece(
            w_at, g_at, count, limit, DTYPE, ACC, GRADS, BLOCK, FLUSH, 1
        )
    c1 = _count_nonfinite(w_at, count, s0, DTYPE, BLOCK)
    c2 = tl.full((), 0, tl.int32)
    if GRADS:
        c2 = _count_nonfinite(g_at, count, s2, DTYPE, BLOCK)
    stride = pieces.to(tl.int64)
    out = partial + tl.load(row + 9) + local
    tl.store(out, s0)
    tl.store(out + stride, s1)
    tl.store(out + stride * 2, s2)
    tl.store(out + stride * 3, s3)
    tl.store(out + stride * 4, s4)
    tl.store(out + stride * 5, s5)
    tl.store(out + stride * 6, s6)
    tl.store(out + stride * 7, c0.to(tl.float64))
    tl.store(out + stride * 8, c1.to(tl.float64))
    tl.store(out + stride * 9, c2.to(tl.float64))
    if of_filter == 1:
        at = tl.load(row + 10) + f
        _store_filter(filter_sums, filter_counts, at, filters.to(tl.int64),
                      s0, s1, s2, s3, s4, s5, c0, c1, c2)  # fmt: skip


@triton.jit
def _add_layer(
    ranges, partial, layer_sums, layer_counts, program, stride, BLOCK: tl.constexpr
):  # fmt: skip
    layer = program // 10
    column = program - layer * 10
    first = tl.load(ranges + layer)
    count = tl.load(ranges + layer + 1) - first
    lane = tl.arange(0, BLOCK)
    acc = tl.full((BLOCK,), 0, tl.float64)
    for i in range(0, count, BLOCK):
        at = partial + column * stride + first + i + lane
        acc += tl.load(at, mask=i + lane < count, other=0)
    total = tl.sum(acc)
    if column < 7:
        tl.store(layer_sums + layer * 7 + column, total)
    else:
        tl.store(layer_counts + layer * 3 + column - 7, total.to(tl.int64))


@triton.jit
def _add_filter(
    row, partial, filter_sums, filter_counts, stride, filters, TILE: tl.constexpr
):  # fmt: skip
    first = tl.load(row)
    count = tl.load(row + 1)
    f = tl.load(row + 2)
    lane = tl.arange(0, TILE)[None, :]
    column = tl.arange(0, 16).to(tl.int64)
    tile = tl.full((16, TILE), 0, tl.float64)
    for i in range(0, count, TILE):
        at = partial + column[:, None] * stride + first + i + lane
        tile += tl.load(at, mask=(i + lane < count) & (column[:, None] < 10), other=0)
    total = tl.sum(tile, axis=1)
    tl.store(filter_sums + column * filters + f, total.to(tl.float32), mask=column < 6)
    counted = (column >= 7) & (column < 10)
    number = tl.where(counted, total, 0.0).to(tl.int32)
    tl.store(filter_counts + (column - 7) * filters + f, number, mask=counted)


@triton.jit(do_not_specialize=["layers", "filters", "pieces"])
def totals_kernel(
    ranges, splits, partial, filter_sums, filter_counts, layer_sums, layer_counts,
    layers, filters, pieces, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    # The first 10 L programs add one column of one layer each; the others, the pieces of a filter.
    program = tl.program_id(0).to(tl.int64)
    stride = pieces.to(tl.int64)
    if program < layers * 10:
        _add_layer(ranges, partial, layer_sums, layer_counts, program, stride, BLOCK)
    else:
        row = splits + (program - layers * 10) * 3
        _add_filter(row, partial, filter_sums, filter_counts, stride, filters.to(tl.int64), TILE)
