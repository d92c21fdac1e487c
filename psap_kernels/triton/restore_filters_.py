"""restore_filters_ in Triton: tensors[t][rows[t]] = saved[t], bit for bit, any strides.

One launch for all tensors and dtypes. Reads the saved rows and 8 bytes for each row of a block,
writes the rows. A row out of range is left alone: the host does not wait to see it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from psap_kernels import _checks, reference
from psap_kernels.triton import _rows, _tables
from psap_kernels.triton._rows import index_in_row, offset_in_row, row_and_rest

# A row of the table: addresses of tensor and saved, kind, words of a row, dense?, rows of the
# tensor, of saved, words from row to row of both, address and stride of rows, first program, three
# sizes, four strides of the tensor and of saved.
COLUMNS = 23


@triton.jit
def _restore_block(
    row, local, WORD: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    o, rest = row_and_rest(local, tl.load(row + 3), BLOCK, WORDS)
    index = tl.load(row + 9).to(tl.pointer_type(tl.int64))
    to = tl.load(index + o * tl.load(row + 10), mask=o < tl.load(row + 6), other=-1)
    to = tl.max_constancy(to, WORDS)
    tl.device_assert((o >= tl.load(row + 6)) | ((to >= 0) & (to < tl.load(row + 5))))
    inside = (to >= 0) & (to < tl.load(row + 5))
    target = tl.load(row).to(tl.pointer_type(WORD))
    source = tl.load(row + 1).to(tl.pointer_type(WORD))
    target_step = tl.load(row + 7)
    source_step = tl.load(row + 8)
    if WORDS > 1:
        read = tl.multiple_of(source, 16) + o * tl.multiple_of(source_step, WORDS) + rest
        write = tl.multiple_of(target, 16) + to * tl.multiple_of(target_step, WORDS) + rest
        tl.store(write, tl.load(read, mask=inside), mask=inside)
    else:
        i1, i2, i3, i4 = index_in_row(rest, tl.load(row + 4), row + 12)
        read = source + o * source_step + offset_in_row(i1, i2, i3, i4, row + 19)
        write = target + to * target_step + offset_in_row(i1, i2, i3, i4, row + 15)
        tl.store(write, tl.load(read, mask=inside), mask=inside)


@triton.jit
def _restore_kernel(
    table, programs, BLOCK: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = table + tl.load(programs + program).to(tl.int64) * COLUMNS
    local = program - tl.load(row + 11)
    kind = tl.load(row + 2)
    if kind == 4:
        _restore_block(row, local, tl.int32, 4, BLOCK)
    elif kind == 3:
        _restore_block(row, local, tl.int64, 1, BLOCK)
    elif kind == 2:
        _restore_block(row, local, tl.int32, 1, BLOCK)
    elif kind == 1:
        _restore_block(row, local, tl.int16, 1, BLOCK)
    else:
        _restore_block(row, local, tl.int8, 1, BLOCK)


def constants() -> dict[str, object]:
    """The compile-time arguments."""
    return {"BLOCK": _rows.BLOCK, "COLUMNS": COLUMNS}


class _Layer(NamedTuple):
    tensor: int
    saved: int
    rows: int
    saved_rows: int
    list_at: int
    list_stride: int
    layout: _rows.Layout


@lru_cache(maxsize=64)
def _plan(layers: tuple[_Layer, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    numbers: list[int] = []
    counts: list[int] = []
    for layer in layers:
        layout = layer.layout
        numbers += [layer.tensor, layer.saved, layout.kind, layout.inner, layout.flat]
        numbers += [layer.rows, layer.saved_rows, *layout.rows, layer.list_at, layer.list_stride]
        numbers += [sum(counts), *layout.sizes, *layout.strides[0], *layout.strides[1]]
        counts.append(_rows.blocks(layer.saved_rows * layout.inner))
    return _tables.upload(tuple(numbers), device), _tables.program_map(tuple(counts), device)


def _check(tensors: list[Tensor], rows: list[Tensor], saved: list[Tensor]) -> None:
    op = "restore_filters_"
    _tables.one_device(op, tensors, rows, saved)
    alike = len(tensors) == len(rows) == len(saved)
    _tables.want(alike, op, "one list of rows and one saved for each tensor are wanted")
    for tensor, index, values in zip(tensors, rows, saved, strict=True):
        _tables.want(tensor.dim() > 0, op, "tensors must be [O, ...]")
        _tables.want(not _checks.expanded(tensor), op, "an expanded tensor cannot be written")
        fits = index.dtype == torch.int64 and index.dim() == 1
        _tables.want(fits, op, "rows must be int64, of one dimension")
        shape = (index.shape[0], *tensor.shape[1:])
        fits = values.dtype == tensor.dtype and values.shape == shape
        _tables.want(fits, op, "saved must have the dtype of its tensor and a row for each of rows")


def restore_filters_(tensors: list[Tensor], rows: list[Tensor], saved: list[Tensor]) -> None:
    """Put saved rows back; see the schema."""
    _check(tensors, rows, saved)
    layers = []
    for tensor, index, values in zip(tensors, rows, saved, strict=True):
        if not values.numel():
            continue
        strides, low = (tensor.stride(), values.stride()), _rows.misaligned([tensor, values])
        layout = _rows.layout(tensor.shape, strides, tensor.itemsize, low)
        if layout is None or _rows.lazy(tensor) or _rows.lazy(values):
            reference.restore_filters_([tensor], [index], [values])
            continue
        layers.append(
            _Layer(
                tensor.data_ptr(), values.data_ptr(), tensor.shape[0], values.shape[0],
                index.data_ptr(), index.stride(0), layout,
            )
        )  # fmt: skip
    if layers:
        device = tensors[0].device
        table, programs = _plan(tuple(layers), device)
        with _tables.on(device, table, programs):
            _restore_kernel[(len(programs),)](table, programs, **constants(), **_tables.OPTIONS)
