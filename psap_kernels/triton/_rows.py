"""Rows of dimension 0 that are written in place: layouts for zero_filters_ and restore_filters_.

Bits are moved, not numbers: a tensor is seen as rows of words of 1, 2, 4 or 8 bytes, the widest
that its addresses and strides allow, or of whole vectors where a row is dense. A row has up to four
dimensions once those that lie behind one another are merged; the rare rest takes the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from psap_kernels.triton import _tables

BLOCK = 512  # words of a program
DIMS = 4
VECTORS = 4  # the kind of a layout of vectors; 0 to 3: words of 2^kind bytes
_MAX_INT32 = 2**31 - 1


@triton.jit
def row_and_rest(
    local, inner, BLOCK: tl.constexpr, WORDS: tl.constexpr
):  # fmt: skip
    """The row of every lane, int64, and its place there, int32; both whole vectors of WORDS."""
    at = local * BLOCK
    first = at // inner
    rest = tl.multiple_of((at - first * inner).to(tl.int32), WORDS) + tl.arange(0, BLOCK)
    length = tl.multiple_of(inner.to(tl.int32), WORDS)
    rows = rest // length
    return first + rows, rest - rows * length


@triton.jit
def index_in_row(rest, flat, sizes):
    """Split a place in a row into four indices; ``sizes`` points to the last three sizes."""
    zero = rest * 0
    i1, i2, i3, i4 = zero, zero, zero, rest
    if flat == 0:
        n4 = tl.load(sizes + 2).to(tl.int32)
        n3 = tl.load(sizes + 1).to(tl.int32)
        n2 = tl.load(sizes).to(tl.int32)
        outer = rest // n4
        i4 = rest - outer * n4
        i2 = outer // n3
        i3 = outer - i2 * n3
        i1 = i2 // n2
        i2 -= i1 * n2
    return i1, i2, i3, i4


@triton.jit
def offset_in_row(i1, i2, i3, i4, strides):
    """Words from the start of a row; ``strides`` points to four of them."""
    return (
        i1.to(tl.int64) * tl.load(strides)
        + i2.to(tl.int64) * tl.load(strides + 1)
        + i3.to(tl.int64) * tl.load(strides + 2)
        + i4.to(tl.int64) * tl.load(strides + 3)
    )


class Layout(NamedTuple):
    """Tensors of one shape as rows of words; strides in words, for each of the tensors."""

    kind: int
    inner: int  # words of a row
    flat: int  # 1: a row is dense in all of the tensors
    sizes: tuple[int, ...]  # the last three of four dimensions
    rows: tuple[int, ...]  # words from row to row
    strides: tuple[tuple[int, ...], ...]  # within a row


@lru_cache(maxsize=4096)
def layout(
    shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...], itemsize: int, misaligned: int
) -> Layout | None:
    """Describe tensors of row shape ``shape[1:]``; None where a kernel cannot.

    ``misaligned`` is the bitwise or of their addresses, modulo a vector.
    """
    word = min(itemsize, 8)
    scale = itemsize // word
    dims = [
        (n, tuple(s[d + 1] * scale for s in strides)) for d, n in enumerate(shape[1:]) if n != 1
    ]
    rows = tuple(s[0] * scale for s in strides)
    dims.sort(key=lambda dim: dim[1], reverse=True)
    if scale > 1:
        dims.append((scale, (1,) * len(strides)))
    dims = _merge(dims)
    if not dims:
        dims = [(1, (1,) * len(strides))]
    flat = len(dims) == 1 and set(dims[0][1]) == {1}
    if len(dims) > DIMS or any(n > _MAX_INT32 - BLOCK for n, _ in dims):
        return None
    kind = word.bit_length() - 1
    if flat:
        together = misaligned | dims[0][0] * word
        for step in rows:
            together |= step * word
        kind, wide = _widest(word, together)
        dims = [(dims[0][0] * word // wide, dims[0][1])]
        rows = tuple(step * word // wide for step in rows)
    dims = [(1, (0,) * len(strides))] * (DIMS - len(dims)) + dims
    inner = 1
    for n, _ in dims:
        inner *= n
    if inner > _MAX_INT32 - BLOCK:
        return None
    within = tuple(tuple(dim[1][t] for dim in dims) for t in range(len(strides)))
    return Layout(kind, inner, int(flat), tuple(n for n, _ in dims[1:]), rows, within)


def _merge(dims: list[tuple[int, tuple[int, ...]]]) -> list[tuple[int, tuple[int, ...]]]:
    """Join neighbours (outermost first) that lie behind one another in every tensor."""
    merged: list[tuple[int, tuple[int, ...]]] = []
    for n, steps in dims:
        if merged and merged[-1][1] == tuple(step * n for step in steps):
            merged[-1] = (merged[-1][0] * n, steps)
        else:
            merged.append((n, steps))
    return merged


def _widest(word: int, together: int) -> tuple[int, int]:
    """The kind of the widest words that divide everything, and their bytes."""
    if together % _tables.VECTOR_BYTES == 0:
        return VECTORS, 4
    wide = 8
    while together % wide:
        wide //= 2
    wide = max(word, wide)
    return wide.bit_length() - 1, wide


def misaligned(tensors: Sequence[Tensor]) -> int:
    """The low bits of all addresses together."""
    bits = 0
    for tensor in tensors:
        bits |= tensor.data_ptr()
    return bits % _tables.VECTOR_BYTES


def blocks(words: int) -> int:
    """Programs for this many words."""
    return _tables.ceil_div(words, BLOCK)


def lazy(tensor: Tensor) -> bool:
    """Whether the numbers differ from the bits: a conjugate or negative view."""
    return tensor.is_conj() or tensor.is_neg()
