"""layer_stats once more: float64 terms added exactly, written from the definition."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Expected:
    """Sums and the magnitudes added for them, [7, O]; counts [3, O]; of one layer."""

    sums: np.ndarray
    magnitudes: np.ndarray
    counts: np.ndarray


def layer(weight: torch.Tensor, grad: torch.Tensor | None, tau: float) -> Expected:
    """Statistics of one layer, filter by filter."""
    w = weight.detach().double().numpy()
    g = np.zeros_like(w) if grad is None else grad.detach().double().numpy()
    columns = [_filter(w[o].ravel(), g[o].ravel(), tau) for o in range(len(w))]
    sums, magnitudes, counts = zip(*columns, strict=True) if columns else ([], [], [])
    return Expected(
        np.array(sums, dtype=np.float64).reshape(-1, 7).T,
        np.array(magnitudes, dtype=np.float64).reshape(-1, 7).T,
        np.array(counts, dtype=np.int64).reshape(-1, 3).T,
    )


def add(terms: np.ndarray) -> float:
    """The sum, rounded once."""
    return math.fsum(terms.tolist())


def _filter(w: np.ndarray, g: np.ndarray, tau: float) -> tuple[list[float], ...]:
    with np.errstate(invalid="ignore"):
        terms = [np.abs(w), w * w, np.abs(g), g * g, np.abs(w * g), w * g, w]
        counts = [
            int((np.abs(w) < np.float32(tau)).sum()),
            int((~np.isfinite(w)).sum()),
            int((~np.isfinite(g)).sum()),
        ]
        return [add(t) for t in terms], [add(np.abs(t)) for t in terms], counts
