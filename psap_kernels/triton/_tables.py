"""What the kernels must know of many tensors: pointer tables on the device, cached by content.

A table is int64, one row a tensor; its columns are raw addresses, lengths and strides. Programs are
numbered through all tensors; a map int32 says whose tensor each program's work is. Both are cached
by what they hold, so a call that repeats uploads nothing. A table holds no reference: whoever
launches keeps the tensors alive until then, and the allocator orders what follows on the stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

VECTOR_BYTES = 16  # the widest load of a GPU thread
# Of every launch. Results may depend on both, so nothing here is tuned at run time.
THREADS = 128
OPTIONS = {"num_warps": THREADS // 32, "enable_fp_fusion": True}
ELEMENTS = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@triton.jit
def elements(address, TYPE: tl.constexpr, VECTOR: tl.constexpr):
    """A pointer to ``TYPE``; with VECTOR > 1 the compiler may rely on whole vectors there.

    A hint holds for the operation that made a value, hence for all its uses: each body casts for
    itself, or the generic one would read vectors, too.
    """
    pointer = address.to(tl.pointer_type(TYPE))
    if VECTOR > 1:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def length_of(count, VECTOR: tl.constexpr):
    """int64 ``count`` as int32, known to be a multiple of VECTOR."""
    length = count.to(tl.int32)
    if VECTOR > 1:
        length = tl.multiple_of(length, VECTOR)
    return length


def arithmetic(dtype: torch.dtype) -> tl.dtype:
    """The number type that elements of ``dtype`` are multiplied and added in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


# Decided when triton and this module are imported: setting TRITON_INTERPRET later changes nothing.
_DEVICE_TYPE = "cuda" if isinstance(elements, triton.JITFunction) else "cpu"


def one_device(op: str, *lists: Sequence[Tensor]) -> None:
    """Refuse tensors on several or on foreign devices: a kernel would follow foreign pointers."""
    devices = {tensor.device for tensors in lists for tensor in tensors}
    if len(devices) > 1 or any(device.type != _DEVICE_TYPE for device in devices):
        names = ", ".join(sorted(map(str, devices)))
        raise RuntimeError(f"{op}: tensors are on {names}, wanted one {_DEVICE_TYPE} device")


def want(condition: bool, op: str, wanted: str) -> None:
    """Refuse arguments that would be read or written out of bounds."""
    if not condition:
        raise RuntimeError(f"{op}: {wanted}")


_captured: list[Tensor] = []  # what CUDA graphs read whenever they are replayed


def on(device: torch.device, *tables: Tensor) -> AbstractContextManager[object]:
    """Launch on this device kernels that read ``tables``; the interpreter needs nothing.

    A table outlives its place in a cache: until the kernels of this stream are done, or for good
    if a CUDA graph is being captured.
    """
    if device.type != "cuda":
        return nullcontext()
    if torch.cuda.is_current_stream_capturing():
        _captured.extend(tables)
    else:
        stream = torch.cuda.current_stream(device)
        for table in tables:
            table.record_stream(stream)
    return torch.cuda.device(device)


@lru_cache(maxsize=64)
def upload(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 ``numbers`` on the device; the same tensor for the same numbers."""
    return torch.tensor(numbers, dtype=torch.int64).to(device)


@lru_cache(maxsize=64)
def program_map(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """int32: entry i counts[i] times, the owner of each program."""
    owners = torch.arange(len(counts), dtype=torch.int32)
    return owners.repeat_interleave(torch.tensor(counts, dtype=torch.int64)).to(device)


def firsts(counts: Sequence[int]) -> list[int]:
    """Where each entry begins if they are laid out one after the other; the end comes last."""
    return [0, *accumulate(counts)]


def ceil_div(a: int, b: int) -> int:
    """A / b, rounded up."""
    return -(-a // b)


@lru_cache(maxsize=4096)
def dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether the elements fill one stretch of memory, in whatever order."""
    length = 1
    for step, size in sorted(zip(stride, shape, strict=True)):
        if size == 1:
            continue
        if step != length:
            return False
        length *= size
    return True


@lru_cache(maxsize=4096)
def _alike(shape: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return all(n == 1 or x == y for n, x, y in zip(shape, a, b, strict=True))


def dense_filters(tensor: Tensor) -> Tensor:
    """``tensor``, or a contiguous copy where a row of dimension 0 is not dense."""
    if tensor.numel() == 0 or dense(tensor.shape[1:], tensor.stride()[1:]):
        return tensor
    return tensor.contiguous()


def like_filters(tensor: Tensor, of: Tensor) -> Tensor:
    """``tensor``, or a copy of it whose rows are laid out as the dense ones of ``of``."""
    inner = of.stride()[1:]
    if tensor.numel() == 0 or _alike(tensor.shape[1:], tensor.stride()[1:], inner):
        return tensor
    stride = (of.shape[1:].numel(), *inner)
    return torch.empty_strided(
        tensor.shape, stride, dtype=tensor.dtype, device=tensor.device
    ).copy_(tensor)


def aligned(*byte_counts: int) -> int:
    """1 if all of these addresses, strides and lengths are whole vectors."""
    together = 0
    for count in byte_counts:
        together |= count
    return int(together % VECTOR_BYTES == 0)
