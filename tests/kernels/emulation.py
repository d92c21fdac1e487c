"""Builds the emulator of the CUDA kernels, and calls it with tensors as the ops are called."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from psap_kernels import reference

ROOT = Path(__file__).parents[2]
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
FLAGS = ("-std=c++17", "-O1", "-g0", "-DPSAP_EMU", "-fPIC", "-shared", "-fvisibility=hidden")
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g")


def missing() -> str | None:
    """Why the emulator cannot be built here, or None."""
    if shutil.which("g++") is None:
        return "the emulator needs g++"
    if importlib.util.find_spec("pybind11") is None:
        return "the emulator needs pybind11"
    return None


def require() -> None:
    """Skip the test, or fail it where the compiled parts are demanded."""
    reason = missing()
    if reason and os.environ.get("PSAP_REQUIRE_EXT") == "1":
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)


def _compile(flags: list[str], source: Path, result: Path) -> None:
    """Whole, or not there: tests in other processes build it too."""
    unfinished = result.with_name(f"{os.getpid()}-{result.name}")
    done = subprocess.run(
        ["g++", *flags, str(source), "-o", str(unfinished)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the emulator does not compile:\n{done.stderr[-4000:]}")
    unfinished.rename(result)


def _cache(*key: object) -> Path:
    digest = hashlib.sha256(repr((key, sys.version)).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"psap-emulator-{os.getuid()}" / digest
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _precompiled(flags: list[str]) -> Path:
    """The headers of pybind11, which take more than half of the time of a build."""
    header = _cache(flags, "headers") / "headers.h"
    compiled = header.with_suffix(".h.gch")
    if not compiled.exists():
        header.write_text("#include <pybind11/pybind11.h>\n#include <pybind11/stl.h>\n")
        _compile([*flags, "-x", "c++-header"], header, compiled)
    return header


def build(csrc: Path, *, sanitize: bool = False, faulty: bool = False) -> Path:
    """Compile the kernels of ``csrc`` for the emulator, unless that has been done.

    With ``faulty``, warnings are no errors, and many builds are expected: they are made fast.
    """
    import pybind11

    includes = [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}"]
    flags = [*FLAGS, *(SANITIZE if sanitize else ()), *includes]
    sources = [p for kind in ("core", "cuda", "emu") for p in sorted((csrc / kind).iterdir())]
    content = [(source.name, source.read_bytes()) for source in sources]
    library = _cache(flags, WARNINGS, faulty, content) / "psap_emulator.so"
    if not library.exists():
        if faulty:
            flags += ["-O0", "-w"]
            flags += ["-include", str(_precompiled(flags))]
        else:
            flags += WARNINGS
        _compile(flags, csrc / "emu" / "module.cpp", library)
    return library


def load(library: Path) -> ModuleType:
    """Import a built emulator."""
    # Unlike names: pybind11 gives out the first module again where a name comes back.
    name = f"{library.parent.name}.psap_emulator"
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _library(name: str) -> str:
    command = ["g++", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def run_sanitized(code: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process that can load a sanitized emulator; skip where there is none."""
    # libstdc++ as well: the sanitizer must find it before the library that throws is loaded.
    preload = [_library("libasan.so"), _library("libstdc++.so.6")]
    if not all(Path(library).is_absolute() for library in preload):
        pytest.skip("g++ has no address sanitizer")
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "PYTHONPATH": f"{Path(__file__).parent}:{ROOT}",
    }
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=environment,
    )


@cache
def emulator() -> ModuleType:
    """The emulator of this tree's kernels."""
    return load(build(ROOT / "csrc"))


def spec(x: Tensor, kind: int | None = None) -> tuple:
    """A tensor as the emulator takes it; ``kind`` is its dtype's number unless given."""
    kind = DTYPES.get(x.dtype, 0) if kind is None else kind
    return x.data_ptr(), kind, list(x.shape), list(x.stride())


def specs(tensors: list[Tensor]) -> list[tuple]:
    return [spec(x) for x in tensors]


def raw(tensors: list[Tensor]) -> list[tuple]:
    """Tensors of which only the bytes count."""
    return [spec(x, x.element_size()) for x in tensors]


class Emulated:
    """The ops, with the arguments of their schemas, on one emulator."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        # One ticket a layer or split filter, zero before and after every launch, as on a GPU.
        self.ticket = torch.zeros(20_000, dtype=torch.int32)

    def layer_stats(
        self, weights: list[Tensor], grads: list[Tensor], tau: Tensor, per_input: bool = False
    ) -> tuple[Tensor, ...]:
        filters, layers = sum(w.shape[0] for w in weights), len(weights)
        inputs = sum(w.shape[1] for w in weights if w.dim() > 1) if per_input else 0
        out = (
            torch.full((6, filters), torch.nan),
            torch.full((3, filters), -1, dtype=torch.int32),
            torch.full((layers, 7), torch.nan, dtype=torch.float64),
            torch.full((layers, 3), -1, dtype=torch.int64),
            torch.full((inputs,), torch.nan),
        )
        self.module.layer_stats(
            specs(weights),
            specs(grads),
            tau.data_ptr(),
            tau.stride(0),
            [t.data_ptr() for t in (*out, self.ticket)],
            self.ticket.numel(),
            per_input,
        )
        assert not self.ticket.any(), "a ticket was not reset"
        return out

    def abs_histogram(
        self, tensors: list[Tensor], scales: Tensor, first: int, shift: int, bins: int
    ) -> Tensor:
        counts = torch.zeros(len(tensors), bins + 2, dtype=torch.int64)
        scales = scales.contiguous()
        self.module.abs_histogram(
            specs(tensors), scales.data_ptr(), first, shift, bins, counts.data_ptr()
        )
        return counts

    def shrink(
        self, tensors: list[Tensor], keep0: list[Tensor], keep1: list[Tensor]
    ) -> list[Tensor]:
        outputs = []
        for x, a, b in zip(tensors, keep0, keep1, strict=True):
            shape = (a.numel(), b.numel(), *x.shape[2:])[: x.dim()]
            format = reference.memory_format(x)
            out = torch.empty(shape, dtype=x.dtype, memory_format=format)
            outputs.append(out.fill_(1))
        self.module.shrink(raw(tensors), raw(keep0), raw(keep1), raw(outputs))
        return outputs

    def zero_filters_(self, tensors: list[Tensor], keep: list[Tensor]) -> None:
        self.module.rows(raw(tensors), raw(keep), [])

    def restore_filters_(
        self, tensors: list[Tensor], rows: list[Tensor], saved: list[Tensor]
    ) -> None:
        self.module.rows(raw(tensors), raw(rows), raw(saved))

    def gate_stats_(
        self,
        sums: Tensor,
        seen: Tensor,
        values: list[Tensor],
        grads: list[Tensor],
        terms: Tensor,
        offsets: Tensor,
        scale: float,
    ) -> None:
        channels = sums.shape[1]
        scratch = torch.full((2, channels), torch.nan, dtype=torch.float64)
        self.module.gate_stats_(
            sums.data_ptr(),
            seen.data_ptr(),
            specs(values),
            specs(grads),
            terms.data_ptr(),
            terms.shape[0],
            offsets.data_ptr(),
            channels,
            scale,
            scratch.data_ptr(),
            self.ticket.data_ptr(),
        )
        assert not self.ticket.any(), "ticket or flag was not reset"
