"""psap turns a convolutional network into a physically smaller one while it trains."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from psap.blocks import drop_blocks
    from psap.config import Config, Target
    from psap.errors import (
        ArgumentError,
        ArgumentTypeError,
        FileError,
        PsapError,
        PsapWarning,
        StateError,
        TargetError,
        TraceError,
        VerificationError,
    )
    from psap.export import export_onnx, export_pt2
    from psap.graph import Graph, trace
    from psap.latency import LatencyTable, measure_latency
    from psap.plans import Plan, plan
    from psap.pruner import Pruner
    from psap.recipe import load, save
    from psap.shrink import Result, apply, mask

__version__ = "0.1.0"

_HOMES = {
    "psap.blocks": ("drop_blocks",),
    "psap.config": ("Config", "Target"),
    "psap.errors": (
        "ArgumentError",
        "ArgumentTypeError",
        "FileError",
        "PsapError",
        "PsapWarning",
        "StateError",
        "TargetError",
        "TraceError",
        "VerificationError",
    ),
    "psap.export": ("export_onnx", "export_pt2"),
    "psap.graph": ("Graph", "trace"),
    "psap.latency": ("LatencyTable", "measure_latency"),
    "psap.plans": ("Plan", "plan"),
    "psap.pruner": ("Pruner",),
    "psap.recipe": ("load", "save"),
    "psap.shrink": ("Result", "apply", "mask"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "Config",
    "FileError",
    "Graph",
    "LatencyTable",
    "Plan",
    "Pruner",
    "PsapError",
    "PsapWarning",
    "Result",
    "StateError",
    "Target",
    "TargetError",
    "TraceError",
    "VerificationError",
    "apply",
    "drop_blocks",
    "export_onnx",
    "export_pt2",
    "load",
    "mask",
    "measure_latency",
    "plan",
    "save",
    "trace",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: ``import psap`` alone stays cheap."""
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'psap' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
