"""Which implementation an op takes: the dispatcher's choice, or one that the user forces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from psap_kernels import _library, _load, reference

BACKENDS = ("auto", "reference", "cpu", "cuda", "triton")

_forced = "auto"
# The compiled part that serves a type of device; these check their arguments themselves.
_PARTS = {"cpu": "_C", "cuda": "_C_cuda"}


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
            (plain PyTorch, any device), "cpu" or "cuda" (the compiled kernels) or "triton" (CUDA
            tensors; with TRITON_INTERPRET=1 set before the first call, CPU tensors too).

    Returns:
        A context manager that restores the former backend; ignore it to keep the new one. The
        choice holds for the whole process, threads included.

    Raises:
        ValueError: ``name`` is not a backend.
        RuntimeError: the backend is not there; the message has the command that mends it.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"name is {name!r}, wanted one of {', '.join(BACKENDS)}")
    missing = None
    if name in _PARTS:
        missing, mend = _load.part(_PARTS[name]).why_missing, _load.mend(_PARTS[name])
    elif name == "triton":
        missing, mend = _load.triton_missing(), "pip install triton"
    if missing:
        raise RuntimeError(f"backend {name!r} is missing: {missing}. To mend it: {mend}")
    former, _forced = _forced, name
    return _Restore(former)


def run(
    name: str, tensors: Sequence[Tensor], arguments: tuple[Any, ...], check: Callable[[], None]
) -> Any:
    """Run op ``name`` where ``tensors``, its first argument, are.

    The compiled kernels check all that matters before they write anything, so ``check``, which is
    slower and says it better, runs only if they refuse; for any other implementation it runs first.
    Nothing is recorded for autograd.
    """
    if not torch.compiler.is_compiling() and _is_compiled(tensors):
        try:
            with torch._C._AutoDispatchBelowAutograd():  # cheaper than no_grad, and less to pass
                return _library.call(name, arguments)
        except Exception:
            check()
            raise
    check()
    op = getattr(torch.ops.psap, name).default
    with torch.no_grad():
        return _implementation(name, op, device_of(tensors))(*arguments)


def device_of(tensors: object) -> torch.device:
    """Where a list of tensors is; the CPU if that cannot be said."""
    if isinstance(tensors, (list, tuple)) and tensors and isinstance(tensors[0], Tensor):
        return tensors[0].device
    return torch.device("cpu")


def _is_compiled(tensors: object) -> bool:
    """Whether a compiled kernel will run; anything strange is left to the checks."""
    if not isinstance(tensors, (list, tuple)) or not tensors or not isinstance(tensors[0], Tensor):
        return False
    device = "cpu" if tensors[0].is_cpu else "cuda" if tensors[0].is_cuda else "other"
    if _forced not in ("auto", device) or device == "other":
        return False
    return _load.part(_PARTS[device]).module is not None


def _telling_autograd(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """``kernel`` does not come by the dispatcher, which would count the versions."""

    def run(*arguments: Any) -> Any:
        _library.count_versions(name, arguments)
        return kernel(*arguments)

    return run


def _implementation(name: str, op: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    if _forced == "reference":
        chosen: Callable[..., Any] = getattr(reference, name)
        return chosen
    if _forced == "triton" and (device.type == "cuda" or _load.triton_interprets()):
        found = _load.triton_op(name)
        if found is None:
            raise RuntimeError(f"backend 'triton' has no op {name!r}: use_backend('auto')")
        return _telling_autograd(name, found)
    if _forced != "auto" and _forced != device.type:
        wanted = "the CPU" if _forced == "cpu" else "a CUDA device"
        raise ValueError(
            f"backend {_forced!r} is forced, but the tensors are on {device}: move them to"
            f" {wanted}, or use_backend('auto')"
        )
    return op
