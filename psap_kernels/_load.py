"""Finds the compiled parts, and remembers why one is missing."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch

MEND = "pip install --no-build-isolation -e . (needs a C++ compiler and torch; -v shows its errors)"
OLDEST_TORCH = (2, 10)


@dataclass(frozen=True)
class Part:
    """One compiled module: either ``module`` is there, or ``why_missing`` says why not."""

    module: ModuleType | None
    why_missing: str | None


@cache
def part(name: str) -> Part:
    """Load ``psap_kernels.<name>`` (``_C`` or ``_C_cuda``), once.

    Loading registers its kernels with the dispatcher. Nothing is raised or printed.
    """
    full_name = f"psap_kernels.{name}"
    if importlib.util.find_spec(full_name) is None:
        return Part(None, f"{full_name} was not built when psap was installed")
    version = tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2])
    if version < OLDEST_TORCH:
        return Part(None, f"{full_name} needs torch >= 2.10, this is {torch.__version__}")
    try:
        return Part(importlib.import_module(full_name), None)
    except (ImportError, OSError) as error:
        return Part(None, f"{full_name} does not load: {error}")


@cache
def triton_missing() -> str | None:
    """Why Triton cannot be used, or None; triton itself is not imported."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


def triton_interprets() -> bool:
    """Whether Triton kernels run in its interpreter, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def triton_op(name: str) -> Callable[..., Any] | None:
    """The Triton implementation of op ``name``, imported now; None where there is none."""
    full_name = f"psap_kernels.triton.{name}"
    if triton_missing() or importlib.util.find_spec(full_name) is None:
        return None
    found: Callable[..., Any] = getattr(importlib.import_module(full_name), name)
    return found


def mend(name: str) -> str:
    """The command that builds a part."""
    if name != "_C_cuda":
        return MEND
    first = ""
    if torch.version.cuda is None:
        first = f"install a PyTorch that is built with CUDA (this is {torch.__version__}), then "
    return (
        f"{first}PSAP_CUDA=1 {MEND}; it needs nvcc too (CUDA_HOME names the CUDA toolkit), and "
        "TORCH_CUDA_ARCH_LIST=9.0 builds for one kind of GPU only"
    )


def build_info() -> dict[str, Any]:
    """Tell what is compiled, where it lies, and what mends what is missing.

    Returns:
        A dict with ``torch`` (the version in use), ``mend`` (the command that builds the missing
        parts, or None) and ``parts``: for ``"_C"``, and for ``"_C_cuda"`` if this torch is built
        with CUDA, a dict of ``available``, ``path``, ``torch_built`` (the version compiled
        against), ``why_missing``, and ``capability`` (instruction set in use: "avx2" or "default")
        or ``architectures`` (of GPUs, as in TORCH_CUDA_ARCH_LIST); what does not apply is None.

    Raises:
        ValueError: PSAP_CPU_CAPABILITY asks for what this machine lacks.
    """
    cpu: Any = part("_C").module
    parts = {"_C": {**_facts("_C"), "capability": cpu.cpu_capability() if cpu else None}}
    if torch.version.cuda is not None:
        cuda: Any = part("_C_cuda").module
        architectures = cuda.architectures if cuda else None
        parts["_C_cuda"] = {**_facts("_C_cuda"), "architectures": architectures}
    missing = [name for name, facts in parts.items() if not facts["available"]]
    command = mend(missing[0]) if missing else None
    return {"torch": torch.__version__, "parts": parts, "mend": command}


def _facts(name: str) -> dict[str, Any]:
    module: Any = part(name).module
    return {
        "available": module is not None,
        "path": module.__file__ if module else None,
        "torch_built": module.torch_version if module else None,
        "why_missing": part(name).why_missing,
    }
