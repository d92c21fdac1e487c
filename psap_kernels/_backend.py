"""Which implementation an op takes: the dispatcher's choice, or one that the user forces."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

from psap_kernels import _load

BACKENDS = ("auto", "reference", "cpu")

_forced = "auto"


class _Restore:
    """Puts the former backend back when a ``with`` block ends."""

    def __init__(self, former: str) -> None:
        self._former = former

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        global _forced
        _forced = self._former


def use_backend(name: str) -> _Restore:
    """Force the backend of every op, from now on or for a ``with`` block.

    Args:
        name: "auto" (the fastest that is built for the device of the tensors), "reference"
            (plain PyTorch, any device) or "cpu" (the compiled CPU kernels).

    Returns:
        A context manager that restores the former backend; ignore it to keep the new one. The
        choice holds for the whole process, threads included.

    Raises:
        ValueError: ``name`` is not a backend.
        RuntimeError: the backend is not built; the message has the command that builds it.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"name is {name!r}, wanted one of {', '.join(BACKENDS)}")
    if name == "cpu" and _load.part("_C").module is None:
        raise RuntimeError(
            f"backend 'cpu' is missing: {_load.part('_C').why_missing}. To mend it: {_load.MEND}"
        )
    former, _forced = _forced, name
    return _Restore(former)


def select(
    op: Callable[..., Any], reference: Callable[..., Any], device: torch.device
) -> Callable[..., Any]:
    """Return what to call for tensors on ``device``: the dispatcher's ``op`` or the reference."""
    if _forced == "reference":
        return reference
    if _forced == "cpu" and device.type != "cpu":
        raise ValueError(
            f"backend 'cpu' is forced, but the tensors are on {device}: move them to the CPU, or"
            " use_backend('auto')"
        )
    return op
