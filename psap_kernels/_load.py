"""Finds the compiled parts, and remembers why one is missing."""

from __future__ import annotations

import importlib
import importlib.util
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
    """Load ``psap_kernels.<name>`` (``_C``, later ``_C_cuda``), once.

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


def build_info() -> dict[str, Any]:
    """Tell what is compiled, where it lies, and what mends what is missing.

    Returns:
        A dict with ``torch`` (the version in use), ``mend`` (the command that builds the missing
        parts, or None) and ``parts``: for ``"_C"`` a dict of ``available``, ``path``,
        ``torch_built`` (the version compiled against), ``capability`` (instruction set in use:
        "avx2" or "default") and ``why_missing``; what does not apply is None.

    Raises:
        ValueError: PSAP_CPU_CAPABILITY asks for what this machine lacks.
    """
    cpu = part("_C")
    module: Any = cpu.module
    return {
        "torch": torch.__version__,
        "parts": {
            "_C": {
                "available": module is not None,
                "path": module.__file__ if module else None,
                "torch_built": module.torch_version if module else None,
                "capability": module.cpu_capability() if module else None,
                "why_missing": cpu.why_missing,
            }
        },
        "mend": None if module else MEND,
    }
