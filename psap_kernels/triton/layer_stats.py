"""layer_stats in Triton.

For every filter f (row of dimension 0) of every layer, over its elements i,
  sum |w|, w^2, |g|, g^2, |w g|, w g, w;  #(|w| < tau), #non-finite w, #non-finite g
and the same totals per layer. Fused: ten reductions over two tensors, all layers in one launch for
each dtype, then one for the totals; `per_input` adds a launch for each dtype and one (_input_sums).
Reads every weight and gradient once (a filter with non-finite sums twice); writes 36 bytes a
filter, and 80 a piece of at most PIECE elements, which the second launch reads from the cache.
A piece belongs to one program: lanes of the input's arithmetic, folded by a fixed tree and added to
float64 every FLUSH elements. The pieces depend on shapes alone, so the bits do, too.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from psap_kernels.triton import _tables
from psap_kernels.triton._input_sums import input_sums
from psap_kernels.triton._layer_stats_kernels import pieces_kernel, totals_kernel

FLUSH = 8192
PIECE = 8192  # longer filters are split over programs, into at most MOST_PIECES
MOST_PIECES = 4096
# A row of the table: addresses of w and g, their bytes from filter to filter, elements of a filter,
# whether all these are whole vectors, pieces of a filter, elements of a piece, first program of the
# layer, its first piece, its first filter, its number.
COLUMNS = 12
TOTALS_BLOCK = 1024
TILE = 64


class _Layer(NamedTuple):
    dtype: torch.dtype
    filters: int
    length: int  # elements of a filter
    w: int
    g: int
    w_row: int  # bytes from filter to filter
    g_row: int


class _Launch(NamedTuple):
    dtype: torch.dtype
    table: Tensor
    programs: Tensor


class _Plan(NamedTuple):
    launches: list[_Launch]
    ranges: Tensor  # first piece of each layer, and the end
    splits: Tensor  # first piece, number of pieces and filter, of filters of several pieces
    pieces: int
    filters: int
    split_filters: int


def pieces_of(length: int) -> tuple[int, int]:
    """Into how many pieces a filter is split, and the elements of one."""
    size = PIECE
    while _tables.ceil_div(length, size) > MOST_PIECES:
        size *= 2
    return max(1, _tables.ceil_div(length, size)), size


@lru_cache(maxsize=64)
def _split_filters(shapes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    rows = [torch.empty((0, 3), dtype=torch.int64)]
    first_piece = first_filter = 0
    for filters, length in shapes:
        count = pieces_of(length)[0]
        if count > 1:
            f = torch.arange(filters)
            rows.append(
                torch.stack(
                    [first_piece + f * count, torch.full_like(f, count), first_filter + f]
                ).T
            )
        first_piece += filters * count
        first_filter += filters
    return torch.cat(rows).to(device)


@lru_cache(maxsize=64)
def _plan(layers: tuple[_Layer, ...], device: torch.device) -> _Plan:
    counts = [layer.filters * pieces_of(layer.length)[0] for layer in layers]
    first_piece = _tables.firsts(counts)
    first_filter = _tables.firsts([layer.filters for layer in layers])
    launches = []
    for dtype in dict.fromkeys(layer.dtype for layer in layers):
        rows: list[int] = []
        programs: list[int] = []
        for i, layer in enumerate(layers):
            if layer.dtype != dtype or not counts[i]:
                continue
            of_filter, size = pieces_of(layer.length)
            lengths = (layer.w, layer.g, layer.w_row, layer.g_row, layer.length * dtype.itemsize)
            rows += [
                *(layer.w, layer.g, layer.w_row, layer.g_row, layer.length),
                *(_tables.aligned(*lengths), of_filter, size, sum(programs)),
                *(first_piece[i], first_filter[i], i),
            ]
            programs.append(counts[i])
        if rows:
            table = _tables.upload(tuple(rows), device)
            launches.append(_Launch(dtype, table, _tables.program_map(tuple(programs), device)))
    splits = _split_filters(tuple((layer.filters, layer.length) for layer in layers), device)
    ranges = _tables.upload(tuple(first_piece), device)
    return _Plan(launches, ranges, splits, first_piece[-1], first_filter[-1], len(splits))


def block(dtype: torch.dtype) -> int:
    """One vector a thread."""
    return _tables.THREADS * _tables.VECTOR_BYTES // dtype.itemsize


def constants(dtype: torch.dtype, grads: bool) -> dict[str, object]:
    """The compile-time arguments of the first launch."""
    return {
        "DTYPE": _tables.ELEMENTS[dtype],
        "ACC": _tables.arithmetic(dtype),
        "GRADS": grads,
        "BLOCK": block(dtype),
        "FLUSH": FLUSH,
        "VECTOR": _tables.VECTOR_BYTES // dtype.itemsize,
        "COLUMNS": COLUMNS,
    }


def totals_constants() -> dict[str, object]:
    """The compile-time arguments of the last launch."""
    return {"BLOCK": TOTALS_BLOCK, "TILE": TILE}


def _check(weights: list[Tensor], grads: list[Tensor], tau: Tensor) -> None:
    op = "layer_stats"
    _tables.one_device(op, weights, grads, [tau])
    _tables.want(len(grads) in (0, len(weights)), op, "as many grads as weights are wanted")
    _tables.want(tau.shape == (len(weights),), op, "tau must be [L], one value for each weight")
    _tables.want(tau.dtype == torch.float32, op, "tau must be float32")
    for i, w in enumerate(weights):
        _tables.want(w.dim() > 0, op, "weights must be [O, ...]")
        _tables.want(w.dtype in _tables.ELEMENTS, op, "weights must be of a float dtype")
        longest = (2**31 - 1) * w.shape[0]
        _tables.want(w.numel() <= longest, op, "a filter has more elements than int32 counts")
        alike = not grads or (grads[i].shape == w.shape and grads[i].dtype == w.dtype)
        _tables.want(alike, op, "a gradient has another shape or dtype than its weight")


def layer_stats(
    weights: list[Tensor], grads: list[Tensor], tau: Tensor, per_input: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sums and counts per filter and per layer; see the schema."""
    _check(weights, grads, tau)
    device = tau.device
    # Rows that are not dense are copied; the copies must live until the launch.
    w_dense = [_tables.dense_filters(w) for w in weights]
    g_dense = [_tables.like_filters(g, w) for g, w in zip(grads, w_dense, strict=False)]
    layers = tuple(
        _Layer(
            w.dtype, w.shape[0], w.shape[1:].numel(), w.data_ptr(), g.data_ptr(),
            w.stride(0) * w.itemsize, g.stride(0) * g.itemsize,
        )
        for w, g in zip(w_dense, g_dense or w_dense, strict=True)
    )  # fmt: skip
    plan = _plan(layers, device)
    filter_sums = tau.new_empty((6, plan.filters))
    filter_counts = tau.new_empty((3, plan.filters), dtype=torch.int32)
    layer_sums = tau.new_empty((len(layers), 7), dtype=torch.float64)
    layer_counts = tau.new_empty((len(layers), 3), dtype=torch.int64)
    partial = tau.new_empty((10, plan.pieces), dtype=torch.float64)
    sizes = (plan.filters, plan.pieces)
    tables = [table for launch in plan.launches for table in launch[1:]]
    with _tables.on(device, *tables, plan.ranges, plan.splits):
        for dtype, table, programs in plan.launches:
            pieces_kernel[(len(programs),)](
                table, programs, tau, tau.stride(0), partial, filter_sums, filter_counts, *sizes,
                **constants(dtype, bool(grads)), **_tables.OPTIONS,
            )  # fmt: skip
        if layers:
            totals_kernel[(len(layers) * 10 + plan.split_filters,)](
                plan.ranges, plan.splits, partial, filter_sums, filter_counts, layer_sums,
                layer_counts, len(layers), *sizes, **totals_constants(), **_tables.OPTIONS,
            )  # fmt: skip
    inputs = input_sums(weights, grads, tau) if per_input else tau.new_empty(0)
    return filter_sums, filter_counts, layer_sums, layer_counts, inputs
