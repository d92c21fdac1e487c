"""What several rules need."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from psap.graph.trace import Args, Tracer


def first(out: Any) -> Tensor:
    """The output itself, or the first of several."""
    result: Tensor = out[0] if isinstance(out, (tuple, list)) else out
    return result


def along(x: Tensor, labels: Tensor | None, dim: int) -> Tensor | None:
    """The labels if they vary along this dimension of ``x`` and no other, else None."""
    if labels is None or not labels.numel() == labels.shape[dim] == x.shape[dim]:
        return None
    return labels


def channels_along(t: Tracer, x: Tensor, labels: Tensor, dim: int, op: str) -> Tensor | None:
    """The labels of ``x`` along ``dim`` as int64 [C], or None (and frozen) if they lie elsewhere.

    Labels that also vary along other dimensions (after a pixel shuffle) are united along those: a
    consumer loses a channel at all positions or at none.
    """
    if labels.shape[dim] != x.shape[dim]:
        t.freeze(labels, f"channels lie along another dimension before {op}")
        return None
    if labels.numel() == labels.shape[dim]:
        return labels.reshape(-1)
    if labels.shape[dim] == 1:
        t.freeze(labels, f"{op} slides over the channels")
        return None
    first_one = labels
    for other in range(labels.dim()):
        if other != dim:
            first_one = first_one.narrow(other, 0, 1)
    t.labels.unite(labels, first_one)
    return first_one.reshape(-1)


def freeze_all(t: Tracer, why: str, *tensors: Any) -> None:
    """Freeze the channels of all of these activations."""
    for tensor in tensors:
        labels = t.get(tensor)
        if labels is not None:
            t.freeze(labels, why)


def computed(t: Tracer, *vectors: Any) -> bool:
    """Whether one of these is a tensor, but no parameter: its size is not known to follow."""
    return any(isinstance(v, Tensor) and t.view(v) is None for v in vectors)


def reduced(a: Args, rank: int) -> list[int]:
    """The dimensions that the argument ``dim`` means: all of them if there is none."""
    dims = a.get("dim")
    if dims is None or dims == []:
        return list(range(rank))
    return [d % rank for d in (dims if isinstance(dims, (list, tuple)) else [dims])]


def vector(t: Tracer, x: Any) -> Tensor | None:
    """Labels of an activation, or of a parameter that is a vector, in any direction."""
    labels = t.get(x)
    if labels is not None or t.view(x) is None:
        return labels
    wide = [d for d in range(x.dim()) if x.shape[d] > 1]
    if len(wide) != 1:
        return None
    return t.claim(x, wide[0], "out").view([-1 if d == wide[0] else 1 for d in range(x.dim())])
