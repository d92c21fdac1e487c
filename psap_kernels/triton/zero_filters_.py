"""zero_filters_ in Triton: tensors[t][~keep[t]] = 0, any strides, NaN and Inf included.

One launch for all tensors and dtypes. Writes the cleared rows; reads a byte for each row of a
block, nothing of the tensors.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from psap_kernels import _checks, reference
from psap_kernels.triton import _rows, _tables
from psap_kernels.triton._rows import index_in_row, offset_in_row, row_and_rest

# A row of the table: address, kind, words of a row, dense?, rows, words from row to row, address
# and stride of keep, first program, three sizes, four strides.
COLUMNS = 16


@triton.jit
def _zero_block(
    row, local, WORD: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    o, rest = row_and_rest(local, tl.load(row + 2), BLOCK, WORDS)
    inside = o < tl.load(row + 4)
    keep = tl.load(row + 6).to(tl.pointer_type(tl.uint8))
    kept = tl.load(keep + o * tl.load(row + 7), mask=inside, other=1)
    clear = tl.max_constancy(kept, WORDS) == 0
    base = tl.load(row).to(tl.pointer_type(WORD))
    step = tl.load(row + 5)
    zero = tl.full((BLOCK,), 0, WORD)
    if WORDS > 1:
        at = tl.multiple_of(base, 16) + o * tl.multiple_of(step, WORDS) + rest
        tl.store(at, zero, mask=clear)
    else:
        i1, i2, i3, i4 = index_in_row(rest, tl.load(row + 3), row + 9)
        at = base + o * step + offset_in_row(i1, i2, i3, i4, row + 12)
        tl.store(at, zero, mask=clear)


@triton.jit
def _zero_kernel(
    table, programs, BLOCK: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = table + tl.load(programs + program).to(tl.int64) * COLUMNS
    local = program - tl.load(row + 8)
    kind = tl.load(row + 1)
    if kind == 4:
        _zero_block(row, local, tl.int32, 4, BLOCK)
    elif kind == 3:
        _zero_block(row, local, tl.int64, 1, BLOCK)
    elif kind == 2:
        _zero_block(row, local, tl.int32, 1, BLOCK)
    elif kind == 1:
        _zero_block(row, local, tl.int16, 1, BLOCK)
    else:
        _zero_block(row, local, tl.int8, 1, BLOCK)


def constants() -> dict[str, object]:
    """The compile-time arguments."""
    return {"BLOCK": _rows.BLOCK, "COLUMNS": COLUMNS}


@lru_cache(maxsize=64)
def _plan(
    layers: tuple[tuple[int, int, int, int, _rows.Layout], ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    numbers: list[int] = []
    counts: list[int] = []
    for address, rows, keep, keep_stride, layout in layers:
        numbers += [address, layout.kind, layout.inner, layout.flat, rows, layout.rows[0]]
        numbers += [keep, keep_stride, sum(counts), *layout.sizes, *layout.strides[0]]
        counts.append(_rows.blocks(rows * layout.inner))
    return _tables.upload(tuple(numbers), device), _tables.program_map(tuple(counts), device)


def _check(tensors: list[Tensor], keep: list[Tensor]) -> None:
    op = "zero_filters_"
    _tables.one_device(op, tensors, keep)
    _tables.want(len(keep) == len(tensors), op, "one keep for each tensor is wanted")
    for tensor, kept in zip(tensors, keep, strict=True):
        _tables.want(tensor.dim() > 0, op, "tensors must be [O, ...]")
        _tables.want(not _checks.expanded(tensor), op, "an expanded tensor cannot be written")
        fits = kept.dtype == torch.bool and kept.shape == tensor.shape[:1]
        _tables.want(fits, op, "keep must be bool, one value for each filter")


def zero_filters_(tensors: list[Tensor], keep: list[Tensor]) -> None:
    """Clear the rows that are not kept; see the schema."""
    _check(tensors, keep)
    layers = []
    for tensor, kept in zip(tensors, keep, strict=True):
        if not tensor.numel():
            continue
        strides, low = (tensor.stride(),), _rows.misaligned([tensor])
        layout = _rows.layout(tensor.shape, strides, tensor.itemsize, low)
        if layout is None:
            reference.zero_filters_([tensor], [kept])
            continue
        layers.append((tensor.data_ptr(), tensor.shape[0], kept.data_ptr(), kept.stride(0), layout))
    if layers:
        device = tensors[0].device
        table, programs = _plan(tuple(layers), device)
        with _tables.on(device, table, programs):
            _zero_kernel[(len(programs),)](table, programs, **constants(), **_tables.OPTIONS)
