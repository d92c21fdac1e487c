"""Physical limits: a loop in C that only reads, and memcpy, over the very tensors of a case.

`torch.sum` is not a read limit (its reduction costs more than the reading), so the loop is compiled
with the system's C compiler when it is first needed; without one, `torch.sum` stands in and the
name of the limit says so.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.timing import Run

# An integer sum: the compiler may vectorise it, and -O3 does.
SOURCE = """
#include <stdint.h>
#include <string.h>
uint64_t read_all(const uint64_t** at, const int64_t* bytes, int64_t n) {
  uint64_t sum = 0;
  for (int64_t t = 0; t < n; t++) {
    const uint64_t* p = at[t];
    int64_t words = bytes[t] / 8;
    uint64_t lanes[32] = {0};
    int64_t i = 0;
    for (; i + 32 <= words; i += 32)
      for (int k = 0; k < 32; k++) lanes[k] += p[i + k];
    for (; i < words; i++) sum += p[i];
    for (int k = 0; k < 32; k++) sum += lanes[k];
  }
  return sum;
}
void copy_all(void** to, const void** from, const int64_t* bytes, int64_t n) {
  for (int64_t t = 0; t < n; t++) memcpy(to[t], from[t], bytes[t]);
}
void clear_all(void** to, const int64_t* bytes, int64_t n) {
  for (int64_t t = 0; t < n; t++) memset(to[t], 0, bytes[t]);
}
"""


@cache
def library() -> ctypes.CDLL | None:
    """The compiled loops, or None where there is no C compiler."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, module = Path(folder, "limits.c"), Path(folder, "limits.so")
        source.write_text(SOURCE)
        flags = ["-O3", "-march=native", "-shared", "-fPIC"]
        done = subprocess.run(
            [compiler, *flags, str(source), "-o", str(module)], capture_output=True, check=False
        )
        if done.returncode:
            return None
        loaded = ctypes.CDLL(str(module))
    loaded.read_all.restype = ctypes.c_uint64
    return loaded


def _pointers(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*[t.data_ptr() for t in tensors])


def _sizes(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(tensors))(*[t.nbytes for t in tensors])


def read(tensors: Sequence[Tensor], threads: int) -> tuple[str, Run]:
    """Read every byte of dense tensors once: the name of the limit, and what to time.

    On a GPU it is a copy that moves as many bytes: half of them read, half of them written.
    """
    tensors = [t for t in tensors if t.numel()]
    if tensors and tensors[0].is_cuda:
        return "device copy", device_copy(sum(t.nbytes for t in tensors), tensors[0].device)
    loops = library()
    if loops is None:
        return "torch.sum", lambda: [t.sum() for t in tensors]
    parts = _split(tensors, threads)
    calls = [(_pointers(part), _sizes(part), ctypes.c_int64(len(part))) for part in parts]
    if threads == 1:
        pointers, sizes, count = calls[0]
        return "read loop in C", lambda: loops.read_all(pointers, sizes, count)
    pool = ThreadPoolExecutor(threads)  # ctypes gives the interpreter's lock back
    return "read loop in C", lambda: list(pool.map(lambda call: loops.read_all(*call), calls))


def _split(tensors: Sequence[Tensor], threads: int) -> list[list[Tensor]]:
    if threads == 1:
        return [list(tensors)]
    parts: list[list[Tensor]] = [[] for _ in range(threads)]
    for tensor in tensors:
        flat = torch.as_strided(tensor, (tensor.numel(),), (1,))
        for part, piece in zip(parts, flat.chunk(threads), strict=False):
            part.append(piece)
    return parts


def copy(sources: Sequence[Tensor]) -> tuple[str, Run]:
    """Copy dense tensors into memory that is there already."""
    targets = [torch.empty_like(t) for t in sources]
    if sources and sources[0].is_cuda:
        size = 2 * sum(t.nbytes for t in sources)
        return "device copy", device_copy(size, sources[0].device)
    loops = library()
    if loops is None:
        return "copy_", lambda: [a.copy_(b) for a, b in zip(targets, sources, strict=True)]
    arguments = (_pointers(targets), _pointers(sources), _sizes(sources))
    keep = (targets, sources)
    return "memcpy", lambda: loops.copy_all(*arguments, ctypes.c_int64(len(keep[0])))


def clear(tensors: Sequence[Tensor]) -> tuple[str, Run]:
    """Write zeros over dense tensors of the same sizes."""
    targets = [torch.empty_like(t) for t in tensors]
    loops = library()
    if loops is None or (targets and targets[0].is_cuda):
        return "zero_", lambda: torch._foreach_zero_(targets)
    arguments = (_pointers(targets), _sizes(targets), ctypes.c_int64(len(targets)))
    return "memset", lambda: (loops.clear_all(*arguments), targets)[0]


def device_copy(size: int, device: torch.device) -> Run:
    """Move ``size`` bytes in one copy within the device."""
    source = torch.empty(max(1, size // 2), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)
