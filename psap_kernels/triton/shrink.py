"""shrink in Triton: out[t] = tensors[t][keep_dim0[t]][:, keep_dim1[t]], bit for bit.

Fused: both gathers, all tensors and dtypes in one launch. A program writes one block of an output,
in the order of its memory; threads next to each other read what lies next to each other wherever
the kept channels do. Reads and writes the output's bytes once, and 8 for an index (from the cache
after the first row). Where an index is out of range, zero is written: the host does not wait.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from psap_kernels import reference
from psap_kernels.triton import _rows, _tables

BLOCK = 512
# A row of the table: addresses of tensor and output, kind (words of 2^kind bytes), words of an
# element, rows of the output, words of such a row, its channels (1 if there is no dimension 1),
# whether they come last, address and stride of keep_dim0, rows of the tensor, address and stride of
# keep_dim1 (0: none), channels of the tensor, words from row to row, from channel to channel; the
# last two sizes and three strides of the other dimensions; first program.
COLUMNS = 22


@triton.jit
def _kept(row, place, count, inside):
    """Entries of the keep list described at ``row``; -1 where it is out of range."""
    keep = tl.load(row).to(tl.pointer_type(tl.int64))
    index = tl.load(keep + place.to(tl.int64) * tl.load(row + 1), mask=inside, other=-1)
    ok = (index >= 0) & (index < count)
    tl.device_assert(ok | (inside == 0), "index out of range")
    return tl.where(ok, index, -1)


@triton.jit
def _split(row, rest):
    """Channel, position in the other dimensions and word of an element, for a place in a row."""
    words = tl.load(row + 3).to(tl.int32)
    channels = tl.load(row + 6).to(tl.int32)
    positions = tl.load(row + 5).to(tl.int32) // (channels * words)
    element = rest // words
    word = rest - element * words
    if tl.load(row + 7) != 0:
        position = element // channels
        channel = element - position * channels
    else:
        channel = element // positions
        position = element - channel * positions
    return channel, position, word


@triton.jit
def _offset(row, position):
    """Words from the start of a channel, from the three other dimensions."""
    n2 = tl.load(row + 16).to(tl.int32)
    n3 = tl.load(row + 17).to(tl.int32)
    i3 = position
    i2 = position * 0
    i1 = i2
    if n2 > 0:
        i2 = position // n3
        i3 = position - i2 * n3
        i1 = i2 // n2
        i2 -= i1 * n2
    return (
        i1.to(tl.int64) * tl.load(row + 18)
        + i2.to(tl.int64) * tl.load(row + 19)
        + i3.to(tl.int64) * tl.load(row + 20)
    )


@triton.jit
def _copy_block(row, local, WORD: tl.constexpr, BLOCK: tl.constexpr):
    o, rest = _rows.row_and_rest(local, tl.load(row + 5), BLOCK, 1)
    inside = o < tl.load(row + 4)
    from_row = _kept(row + 8, o, tl.load(row + 10), inside)
    channel, position, word = _split(row, rest)
    from_channel = channel.to(tl.int64)
    if tl.load(row + 11) != 0:
        from_channel = _kept(row + 11, channel, tl.load(row + 13), inside)
    source = tl.load(row).to(tl.pointer_type(WORD)) + _offset(row, position) + word
    source += from_row * tl.load(row + 14) + from_channel * tl.load(row + 15)
    bits = tl.load(source, mask=inside & (from_row >= 0) & (from_channel >= 0), other=0)
    out = tl.load(row + 1).to(tl.pointer_type(WORD)) + local * BLOCK + tl.arange(0, BLOCK)
    tl.store(out, bits, mask=inside)


@triton.jit
def _shrink_kernel(
    table, programs, BLOCK: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = table + tl.load(programs + program).to(tl.int64) * COLUMNS
    local = program - tl.load(row + 21)
    kind = tl.load(row + 2)
    if kind == 3:
        _copy_block(row, local, tl.int64, BLOCK)
    elif kind == 2:
        _copy_block(row, local, tl.int32, BLOCK)
    elif kind == 1:
        _copy_block(row, local, tl.int16, BLOCK)
    else:
        _copy_block(row, local, tl.int8, BLOCK)


def constants() -> dict[str, object]:
    """The compile-time arguments."""
    return {"BLOCK": BLOCK, "COLUMNS": COLUMNS}


class _Others(NamedTuple):
    """The dimensions from 2 on, merged to three."""

    sizes: tuple[int, int]  # the last two; (0, 0) where one dimension is left
    strides: tuple[int, int, int]  # in elements


@lru_cache(maxsize=4096)
def _others(shape: tuple[int, ...], stride: tuple[int, ...]) -> _Others | None:
    dims: list[tuple[int, int]] = []
    for n, step in zip(shape, stride, strict=True):
        if n == 1:
            continue
        if dims and dims[-1][1] == step * n:
            dims[-1] = (dims[-1][0] * n, step)
        else:
            dims.append((n, step))
    if len(dims) > 3:
        return None
    dims = [(1, 0)] * (3 - len(dims)) + dims
    flat = dims[0][0] == dims[1][0] == 1
    sizes = (0, 0) if flat else (dims[1][0], dims[2][0])
    return _Others(sizes, (dims[0][1], dims[1][1], dims[2][1]))


def _row(tensor: Tensor, keep0: Tensor, keep1: Tensor, out: Tensor) -> list[int] | None:
    """A row of the table without the first program; None where the kernel cannot."""
    others = _others(tensor.shape[2:], tensor.stride()[2:])
    word = min(tensor.itemsize, 8)
    scale = tensor.itemsize // word
    inner = out.shape[1:].numel() * scale
    if others is None or inner >= 2**31 - BLOCK:
        return None
    last = reference.memory_format(tensor) != torch.contiguous_format
    row = [tensor.data_ptr(), out.data_ptr(), word.bit_length() - 1, scale, out.shape[0], inner]
    row += [out.shape[1] if out.dim() > 1 else 1, int(last)]
    row += [keep0.data_ptr(), keep0.stride(0), tensor.shape[0]]
    if tensor.dim() > 1:
        row += [keep1.data_ptr(), keep1.stride(0), tensor.shape[1]]
        steps = tensor.stride()[:2]
    else:
        row += [0, 0, 1]
        steps = (tensor.stride(0), 0)
    row += [s * scale for s in steps]
    return [*row, *others.sizes, *(s * scale for s in others.strides)]


def _empty(tensor: Tensor, keep0: Tensor, keep1: Tensor) -> Tensor:
    kept = (keep0.shape[0], keep1.shape[0])[: tensor.dim()]
    return torch.empty(
        (*kept, *tensor.shape[2:]),
        dtype=tensor.dtype,
        device=tensor.device,
        memory_format=reference.memory_format(tensor),
    )


def _check(tensors: list[Tensor], keep_dim0: list[Tensor], keep_dim1: list[Tensor]) -> None:
    op = "shrink"
    _tables.one_device(op, tensors, keep_dim0, keep_dim1)
    alike = len(tensors) == len(keep_dim0) == len(keep_dim1)
    _tables.want(alike, op, "one keep_dim0 and one keep_dim1 for each tensor are wanted")
    for tensor, *keep in zip(tensors, keep_dim0, keep_dim1, strict=True):
        _tables.want(tensor.dim() > 0, op, "tensors must be [O, ...]")
        for index in keep[: tensor.dim()]:
            fits = index.dtype == torch.int64 and index.dim() == 1
            _tables.want(fits, op, "keep lists must be int64, of one dimension")


def shrink(tensors: list[Tensor], keep_dim0: list[Tensor], keep_dim1: list[Tensor]) -> list[Tensor]:
    """Gather kept rows and channels of every tensor; see the schema."""
    _check(tensors, keep_dim0, keep_dim1)
    outputs: list[Tensor] = []
    numbers: list[int] = []
    counts: list[int] = []
    for tensor, keep0, keep1 in zip(tensors, keep_dim0, keep_dim1, strict=True):
        out = _empty(tensor, keep0, keep1)
        row = None if _rows.lazy(tensor) else _row(tensor, keep0, keep1, out)
        if row is None:
            (out,) = reference.shrink([tensor], [keep0], [keep1])
        elif out.numel():
            numbers += [*row, sum(counts)]
            counts.append(_tables.ceil_div(row[4] * row[5], BLOCK))
        outputs.append(out)
    if counts:
        device = tensors[0].device
        table = _tables.upload(tuple(numbers), device)
        programs = _tables.program_map(tuple(counts), device)
        with _tables.on(device, table, programs):
            _shrink_kernel[(len(programs),)](table, programs, **constants(), **_tables.OPTIONS)
    return outputs
