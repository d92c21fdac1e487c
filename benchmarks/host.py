"""What a call costs beside its kernel: 55 layers of next to nothing."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import psap_kernels
from benchmarks.registry import Case, Options, register

LAYERS = 55


@register("host")
def cases(options: Options, device: torch.device, _: int) -> Iterator[Case]:
    """Every op on tensors of four values; the baseline is the dispatcher's op, unchecked."""
    w = [torch.ones(2, 2, 1, 1, device=device) for _ in range(LAYERS)]
    tau, scales = torch.ones(LAYERS, device=device), torch.ones(LAYERS, device=device)
    rows = [torch.tensor([0], device=device) for _ in w]
    keep = [torch.tensor([True, False], device=device) for _ in w]
    saved = [t[:1].clone() for t in w]
    sums = torch.zeros(2, LAYERS, dtype=torch.float64, device=device)
    seen = torch.zeros(2, dtype=torch.int64, device=device)
    terms = torch.tensor([(k, 0, 0) for k in range(LAYERS)], dtype=torch.int32, device=device)
    offsets = torch.arange(LAYERS + 1, dtype=torch.int32, device=device)
    raw = torch.ops.psap
    calls = {
        "layer_stats": (
            lambda: psap_kernels.layer_stats(w, w, tau=tau),
            lambda: raw.layer_stats(w, w, tau),
        ),
        "abs_histogram": (
            lambda: psap_kernels.abs_histogram(w, scales=scales, bins=16),
            lambda: raw.abs_histogram(w, scales, 0, 20, 16),
        ),
        "gate_stats_": (
            lambda: psap_kernels.gate_stats_(sums, seen, w, w, terms, offsets),
            lambda: raw.gate_stats_(sums, seen, w, w, terms, offsets, 1.0),
        ),
        "shrink": (
            lambda: psap_kernels.shrink(w, rows, rows),
            lambda: raw.shrink(w, rows, rows),
        ),
        "zero_filters_": (
            lambda: psap_kernels.zero_filters_(w, keep),
            lambda: raw.zero_filters_(w, keep),
        ),
        "restore_filters_": (
            lambda: psap_kernels.restore_filters_(w, rows, saved),
            lambda: raw.restore_filters_(w, rows, saved),
        ),
    }
    for op, (public, dispatched) in calls.items():
        yield Case(
            op=op,
            name=f"{LAYERS} tiny layers",
            shape="[2, 2, 1, 1] each",
            bytes=LAYERS * w[0].nbytes,
            fused=public,
            verify=lambda: None,  # nothing to compute; the tests of each op are the check
            baselines={"torch.ops alone": dispatched},
        )
