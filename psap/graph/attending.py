"""Modules that multiply activations: whether graph mode can rewrite them, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from psap.errors import VerificationError
from psap.examples import program_of
from psap.graph.labels import Ints, Labels
from psap.shared import together


class Attending:
    """Notes the modules whose forward() multiplies activations, and which channels meet there."""

    def __init__(self) -> None:
        self._calls: dict[type[nn.Module], tuple[nn.Module, Any, Any]] = {}
        self._found: list[tuple[type[nn.Module], Tensor]] = []

    def note(self, call: Mapping[str, Any], channels: Tensor) -> None:
        """Keep the call of the module that runs, if it is the first one of its class."""
        kind = type(call["self"])
        self._calls.setdefault(kind, (call["self"], call["args"], call["kwargs"]))
        self._found.append((kind, channels))

    def settle(self, labels: Labels) -> None:
        """Freeze channels of modules whose forward() may fix widths, and cannot be rewritten."""
        reasons: dict[type[nn.Module], str] = {}

        def try_all() -> None:
            for kind, (module, args, kwargs) in self._calls.items():
                try:
                    with torch.no_grad():
                        program_of(module, args, kwargs)
                except VerificationError as error:
                    reasons[kind] = f"attention in a forward() that cannot be rewritten: {error}"

        if self._calls:
            together(try_all)
        for kind, channels in self._found:
            if kind in reasons:
                labels.freeze(channels, reasons[kind])
        self._calls.clear()


def moving_macs(
    products: list[tuple[Tensor, float]], channel: Ints, group_of: Ints, sizes: list[int]
) -> tuple[float, dict[int, float]]:
    """MACs of products of activations: those of fixed positions, and those of every channel.

    Args:
        products: for each product the labels of its channels, and the MACs of each of them.
        channel: for every label the channel, or -1.
        group_of: for every channel its group.
        sizes: channels of every group.

    Returns:
        MACs of what stays, and for each group that takes part those of one channel.
    """
    fixed = 0.0
    moving = np.zeros(len(sizes))
    for labels, macs in products:
        found = channel[labels.numpy()]
        fixed += macs * float((found < 0).sum())
        np.add.at(moving, group_of[found[found >= 0]], macs)
    return fixed, {n: float(moving[n] / sizes[n]) for n in np.flatnonzero(moving).tolist()}
