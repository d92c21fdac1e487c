"""Every op once on small tensors of all sorts, compared with the reference; for compute-sanitizer.

``python benchmarks/sanitized.py cuda triton``: device, backend.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

import psap_kernels

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = ((7,), (3, 33), (16, 8, 3, 3), (5, 3, 1, 1), (2, 65, 3, 3), (1, 1030))


def inputs(dtype: torch.dtype) -> list[Tensor]:
    """On the CPU, tensors that are odd, channels_last, strided and off any alignment."""
    found = [torch.randn(shape).to(dtype) for shape in SHAPES]
    found.append(found[2].to(memory_format=torch.channels_last))
    found.append(torch.randn(4, 18).to(dtype)[:, ::2])
    found.append(torch.randn(4 * 9 + 1).to(dtype)[1:].view(4, 9))
    # Filters of two pieces; positive, so that no digits cancel. Zeros of a pruned tensor.
    found.append(torch.rand(2, 33_000).to(dtype))
    found[-1][0] = 0
    return found


def moved(tensor: Tensor, device: str) -> Tensor:
    """A copy on the device, with the memory around it: nothing else has written there.

    initcheck watches our kernels alone, and what another kernel writes counts as never written.
    """
    length = tensor.untyped_storage().nbytes() // tensor.element_size()
    whole = tensor.as_strided((length,), (1,), 0).to(device, copy=True)  # no kernel gathers it
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def ops(dtype: torch.dtype, device: str) -> dict[str, list[Tensor]]:
    """The results of every op on the backend in force, in a fixed order, on the CPU."""
    torch.manual_seed(0)
    values, plain = inputs(dtype), [t.contiguous() for t in inputs(dtype)]
    w, zeroed, restored = ([moved(t, device) for t in values] for _ in range(3))
    g = [moved(t, device) for t in plain]
    tau = torch.full((len(w),), 0.5).to(device)
    stats = psap_kernels.layer_stats(w, g, tau=tau, per_input=True)
    alone = psap_kernels.layer_stats(w, tau=tau)
    # More layers than fit into the arguments of a kernel.
    many = list(torch.randn(600, 2, 5).to(dtype).to(device).unbind())
    of_many = psap_kernels.layer_stats(many, many, tau=torch.zeros(600).to(device))
    assert stats.input_weight_grad is not None
    rows = [torch.arange(0, len(t), 2).to(device) for t in w]
    columns = [torch.arange(0, t.shape[1], 2).to(device) if t.dim() > 1 else None for t in w]
    keep = [(torch.arange(len(t)) % 2 == 0).to(device) for t in w]
    psap_kernels.zero_filters_(zeroed, keep)
    saved = [t[::2].to(device) for t in plain]
    psap_kernels.restore_filters_(restored, rows, saved)
    channels = sum(map(len, w))
    terms = [(k, i, i) for k, t in enumerate(w) for i in range(len(t))]
    sums = torch.zeros(2, channels, dtype=torch.float64).to(device)
    seen = torch.zeros(2, dtype=torch.int64).to(device)
    starts = torch.arange(channels + 1, dtype=torch.int32).to(device)
    table = torch.tensor(terms, dtype=torch.int32).to(device)
    psap_kernels.gate_stats_(sums, seen, w, g, table, starts, scale=0.5)
    found = {
        "layer_stats": [
            x
            for each in (stats, alone, of_many)
            for x in (each.filter_sums, each.filter_counts, each.layer_sums, each.layer_counts)
        ],
        "layer_stats per input": [stats.input_weight_grad],
        "abs_histogram": [psap_kernels.abs_histogram(w, scales=torch.ones(len(w)).to(device))],
        "gate_stats_": [sums, seen],
        "shrink": psap_kernels.shrink(w, rows, columns),
        "zero_filters_": zeroed,
        "restore_filters_": restored,
    }
    return {name: [moved(x, "cpu") for x in tensors] for name, tensors in found.items()}


def compare(name: str, got: list[Tensor], want: list[Tensor]) -> None:
    """Exactly, sums within what float32 lanes lose.

    Raises:
        RuntimeError: the op is wrong.
    """
    loose: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5, "equal_nan": True}
    if name not in ("layer_stats", "layer_stats per input", "gate_stats_"):
        loose = {"rtol": 0, "atol": 0, "equal_nan": True}
    for a, b in zip(got, want, strict=True):
        if not torch.allclose(a.double(), b.double(), **loose):
            raise RuntimeError(f"{name} differs from the reference")


def main(device: str, backend: str) -> None:
    """Run every op for every dtype."""
    for dtype in DTYPES:
        with psap_kernels.use_backend("reference"):
            want = ops(dtype, "cpu")
        with psap_kernels.use_backend(backend):
            got = ops(dtype, device)
        for name in want:
            compare(name, got[name], want[name])
    if device != "cpu":
        torch.cuda.synchronize()
    print(f"every op, {backend} on {device}: equal to the reference")


if __name__ == "__main__":
    main(*sys.argv[1:])
