"""sum of w g over every input channel (dimension 1), for layer_stats with per_input.

  input_sums[i] = sum over filters o and positions k of w[o, i, k] g[o, i, k]
Columns first: a program adds one block of columns over SLAB filters, in float32 lanes (float64 for
float64), into a float64 scratch [slabs, columns of a filter]; the second launch adds slabs and
positions in a fixed order. Reads every weight and gradient once more; scratch is 1/64 of an element
count in float64, written and read; writes 4 bytes an input channel.
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

SLAB = 64
# A row of the first table: addresses of w and g, their bytes from filter to filter, filters,
# columns, whether all these are whole vectors, blocks of columns, first program, place in scratch.
COLUMNS = 10
# And of the second: slabs, columns, input channels, positions, the steps in columns from channel to
# channel and from position to position, first program, place in scratch, first output.
SUM_COLUMNS = 9
INPUTS = 16
TILE = 64


@triton.jit
def _sum_columns(
    w_at, g_at, w_bytes, g_bytes, rows, count, out,
    DTYPE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    columns = length_of(count, VECTOR)
    lane = tl.arange(0, BLOCK)
    inside = lane < columns
    acc = tl.full((BLOCK,), 0, ACC)
    for o in range(0, rows):
        w = elements(w_at + o * w_bytes, DTYPE, VECTOR)
        g = elements(g_at + o * g_bytes, DTYPE, VECTOR)
        x = tl.load(w + lane, mask=inside, other=0).to(ACC)
        y = tl.load(g + lane, mask=inside, other=0).to(ACC)
        acc += x * y
    tl.store(out + lane, acc.to(tl.float64), mask=inside)


@triton.jit
def _columns_kernel(
    table, programs, scratch, DTYPE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
    SLAB: tl.constexpr, VECTOR: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = table + tl.load(programs + program).to(tl.int64) * COLUMNS
    blocks = tl.load(row + 7)
    local = program - tl.load(row + 8)
    slab = local // blocks
    begin = (local - slab * blocks) * BLOCK
    columns = tl.load(row + 5)
    rows = tl.minimum(tl.load(row + 4) - slab * SLAB, SLAB).to(tl.int32)
    left = tl.minimum(columns - begin, BLOCK)
    bytes_in: tl.constexpr = DTYPE.primitive_bitwidth // 8
    w_bytes = tl.load(row + 2)
    g_bytes = tl.load(row + 3)
    w = tl.load(row) + slab * SLAB * w_bytes + begin * bytes_in
    g = tl.load(row + 1) + slab * SLAB * g_bytes + begin * bytes_in
    out = scratch + tl.load(row + 9) + slab * columns + begin
    if tl.load(row + 6) != 0:
        _sum_columns(w, g, w_bytes, g_bytes, rows, left, out, DTYPE, ACC, BLOCK, VECTOR)
    else:
        _sum_columns(w, g, w_bytes, g_bytes, rows, left, out, DTYPE, ACC, BLOCK, 1)


@triton.jit
def _inputs_kernel(
    table, programs, scratch, sums,
    INPUTS: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = table + tl.load(programs + program).to(tl.int64) * COLUMNS
    columns = tl.load(row + 1)
    inputs = tl.load(row + 2)
    positions = tl.load(row + 3)
    count = tl.load(row) * positions
    i = (program - tl.load(row + 6)) * INPUTS + tl.arange(0, INPUTS)
    base = scratch + tl.load(row + 7) + i[:, None] * tl.load(row + 4)
    step = tl.load(row + 5)
    tile = tl.full((INPUTS, TILE), 0, tl.float64)
    for start in range(0, count, TILE):
        t = start + tl.arange(0, TILE).to(tl.int64)
        slab = t // positions
        at = slab * columns + (t - slab * positions) * step
        inside = (i[:, None] < inputs) & (t[None, :] < count)
        tile += tl.load(base + at[None, :], mask=inside, other=0)
    tl.store(sums + tl.load(row + 8) + i, tl.sum(tile, axis=1).to(tl.float32), mask=i < inputs)


class _Layer(NamedTuple):
    dtype: torch.dtype
    filters: int
    columns: int
    inputs: int
    last: bool  # channels_last: the input channel is the fastest to vary
    w: int
    g: int
    w_row: int
    g_row: int


class _Plan(NamedTuple):
    launches: list[tuple[torch.dtype, Tensor, Tensor]]
    table: Tensor
    programs: Tensor
    scratch: int
    inputs: int


def block(dtype: torch.dtype) -> int:
    """One vector a thread."""
    return _tables.THREADS * _tables.VECTOR_BYTES // dtype.itemsize


def constants(dtype: torch.dtype) -> dict[str, object]:
    """The compile-time arguments of the first launch."""
    return {
        "DTYPE": _tables.ELEMENTS[dtype],
        "ACC": _tables.arithmetic(dtype),
        "BLOCK": block(dtype),
        "SLAB": SLAB,
        "VECTOR": _tables.VECTOR_BYTES // dtype.itemsize,
        "COLUMNS": COLUMNS,
    }


def sum_constants() -> dict[str, object]:
    """The compile-time arguments of the second launch."""
    return {"INPUTS": INPUTS, "TILE": TILE, "COLUMNS": SUM_COLUMNS}


def _slabs(layer: _Layer) -> int:
    return _tables.ceil_div(layer.filters, SLAB)


def _launch(
    dtype: torch.dtype, layers: tuple[_Layer, ...], places: list[int], device: torch.device
) -> tuple[torch.dtype, Tensor, Tensor]:
    rows: list[int] = []
    programs: list[int] = []
    for layer, place in zip(layers, places, strict=False):
        if layer.dtype != dtype:
            continue
        blocks = _tables.ceil_div(layer.columns, block(dtype))
        pointers = (layer.w, layer.g, layer.w_row, layer.g_row)
        whole = _tables.aligned(*pointers, layer.columns * dtype.itemsize)
        rows += [*pointers, layer.filters, layer.columns, whole, blocks, sum(programs), place]
        programs.append(_slabs(layer) * blocks)
    table = _tables.upload(tuple(rows), device)
    return dtype, table, _tables.program_map(tuple(programs), device)


@lru_cache(maxsize=64)
def _plan(layers: tuple[_Layer, ...], device: torch.device) -> _Plan:
    places = _tables.firsts([_slabs(layer) * layer.columns for layer in layers])
    outputs = _tables.firsts([layer.inputs for layer in layers])
    counts = [_tables.ceil_div(layer.inputs, INPUTS) for layer in layers]
    first = _tables.firsts(counts)
    rows: list[int] = []
    for i, layer in enumerate(layers):
        positions = layer.columns // layer.inputs if layer.inputs else 0
        steps = (1, layer.inputs) if layer.last else (positions, 1)
        rows += [_slabs(layer), layer.columns, layer.inputs, positions, *steps]
        rows += [first[i], places[i], outputs[i]]
    work = tuple(layer for layer in layers if layer.filters and layer.columns)
    spots = [p for p, layer in zip(places, layers, strict=False) if layer in work]
    return _Plan(
        [_launch(d, work, spots, device) for d in dict.fromkeys(layer.dtype for layer in work)],
        _tables.upload(tuple(rows), device),
        _tables.program_map(tuple(counts), device),
        places[-1],
        outputs[-1],
    )


def _by_channel(tensor: Tensor) -> Tensor:
    """``tensor``, or a contiguous copy unless its channels are the outermost or innermost."""
    dense = _tables.dense_filters(tensor)
    inner, inputs = dense.shape[1:].numel(), dense.shape[1]
    if inputs in (0, 1) or inner == 0 or dense.stride(1) in (1, inner // inputs):
        return dense
    return dense.contiguous()


def input_sums(weights: list[Tensor], grads: list[Tensor], tau: Tensor) -> Tensor:
    """float32 [I]: the sums of all layers that have input channels."""
    weights = [w for w in weights if w.dim() > 1]
    grads = [g for g in grads if g.dim() > 1]
    if not grads:
        return tau.new_zeros(sum(w.shape[1] for w in weights))
    w_dense = [_by_channel(w) for w in weights]
    g_dense = [_tables.like_filters(g, w) for g, w in zip(grads, w_dense, strict=True)]
    layers = tuple(
        _Layer(
            w.dtype, w.shape[0], w.shape[1:].numel(), w.shape[1], w.stride(1) == 1,
            w.data_ptr(), g.data_ptr(), w.stride(0) * w.itemsize, g.stride(0) * g.itemsize,
        )
        for w, g in zip(w_dense, g_dense, strict=True)
    )  # fmt: skip
    plan = _plan(layers, tau.device)
    scratch = tau.new_empty(plan.scratch, dtype=torch.float64)
    sums = tau.new_empty(plan.inputs)
    tables = [table for launch in plan.launches for table in launch[1:]]
    with _tables.on(tau.device, *tables, plan.table, plan.programs):
        for dtype, table, programs in plan.launches:
            _columns_kernel[(len(programs),)](
                table, programs, scratch, **constants(dtype), **_tables.OPTIONS
            )
        if plan.inputs:
            _inputs_kernel[(len(plan.programs),)](
                plan.table, plan.programs, scratch, sums, **sum_constants(), **_tables.OPTIONS
            )
    return sums
