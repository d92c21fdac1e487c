"""What several rules need."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from psap.graph.trace import Tracer


def first(out: Any) -> Tensor:
    """The output itself, or the first of several."""
    result: Tensor = out[0] if isinstance(out, (tuple, list)) else out
    return result


def channels_along(t: Tracer, labels: Tensor, dim: int, op: str) -> Tensor | None:
    """The labels along ``dim`` as int64 [C], or None (and frozen) if they vary elsewhere too."""
    if labels.numel() != labels.shape[dim]:
        t.freeze(labels, f"channels are spread over several dimensions before {op}")
        return None
    return labels.reshape(-1)


def freeze_all(t: Tracer, why: str, *tensors: Any) -> None:
    """Freeze the channels of all of these activations."""
    for tensor in tensors:
        labels = t.get(tensor)
        if labels is not None:
            t.freeze(labels, why)
