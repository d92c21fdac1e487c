"""What a call costs beside its kernel: 55 layers of next to nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

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
    written = {"gate_stats_": (sums, seen), "zero_filters_": w, "restore_filters_": w}
    for op, (public, dispatched) in calls.items():
        yield Case(
            op=op,
            name=f"{LAYERS} tiny layers",
            shape="[2, 2, 1, 1] each",
            bytes=LAYERS * w[0].nbytes,
            fused=public,
            verify=partial(_fault, public, *written.get(op, ())),
            baselines={"torch.ops alone": dispatched},
        )


def _fault(call: Callable[[], Any], *written: Tensor) -> str | None:
    """Against the reference, from the same tensors; sums of four terms may differ in order."""
    before = [t.clone() for t in written]

    def result() -> list[Tensor]:
        for tensor, value in zip(written, before, strict=True):
            tensor.copy_(value)
        found = call()
        if is_dataclass(found):
            found = vars(found)
        return [t.clone() for t in (*pytree.tree_leaves(found), *written) if isinstance(t, Tensor)]

    with psap_kernels.use_backend("reference"):
        wanted = result()
    found = result()
    same = [torch.allclose(a, b, rtol=1e-6) for a, b in zip(found, wanted, strict=True)]
    return None if all(same) else f"result {same.index(False)} differs from the reference"
