"""Builds the compiled parts of psap_kernels; everything else is in pyproject.toml.

Environment: PSAP_NO_EXT=1 builds nothing; PSAP_CUDA=0|1 leaves out or demands the CUDA part;
PSAP_REQUIRE_EXT=1 makes what cannot be built an error; TORCH_CUDA_ARCH_LIST, MAX_JOBS: PyTorch's.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGE = "psap_kernels"
# Contraction would give other bits with FMA than without. -Wpsabi warns of vectors passed by
# value between functions; all of ours are inlined. The binary runs on PyTorch >= 2.10.
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-psabi"]
CXX_FLAGS = ["-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", *WARNINGS]
NVCC_FLAGS = ["-O3", "-lineinfo", "-DUSE_CUDA", "-Xcompiler", "-fvisibility=hidden"]
# Compiled for where TORCH_CUDA_ARCH_LIST does not say it; PTX of the last one serves later GPUs.
CUDA_ARCHITECTURES = "8.0;9.0;10.0+PTX"


class BuildError(RuntimeError):
    """A part that the environment demands cannot be built."""


def parts_to_build(
    env: Mapping[str, str], *, torch_cuda: str | None, has_nvcc: bool, has_cuda_sources: bool
) -> list[str]:
    """Return the modules to build, in order: none, ``_C``, or ``_C`` and ``_C_cuda``.

    Whether a GPU is present does not matter: wheels are built on machines without one.
    """
    if env.get("PSAP_NO_EXT") == "1":
        if "1" in (env.get("PSAP_CUDA"), env.get("PSAP_REQUIRE_EXT")):
            raise BuildError("PSAP_NO_EXT=1 contradicts PSAP_CUDA=1, PSAP_REQUIRE_EXT=1: unset one")
        return []
    choice = env.get("PSAP_CUDA", "")
    if choice not in ("", "0", "1"):
        raise BuildError(f"PSAP_CUDA is {choice!r}, wanted 0 or 1 (or unset: built where possible)")
    needed = {
        "a PyTorch built with CUDA (torch.version.cuda is None)": torch_cuda is not None,
        "nvcc (set CUDA_HOME to the CUDA toolkit)": has_nvcc,
        "csrc/cuda/*.cu (this version has no CUDA kernels)": has_cuda_sources,
    }
    missing = [what for what, present in needed.items() if not present]
    if choice == "1" and missing:
        raise BuildError("PSAP_CUDA=1, but these are missing: " + "; ".join(missing))
    return ["_C"] if choice == "0" or missing else ["_C", "_C_cuda"]


def warn(reason: object) -> tuple[list[Extension], dict[str, Any]]:
    """Say on stderr what is missing (an error where it is required); return nothing to build."""
    if os.environ.get("PSAP_REQUIRE_EXT") == "1":
        raise BuildError(f"PSAP_REQUIRE_EXT=1, but {reason}")
    print(
        f"\nWARNING: {PACKAGE} is installed WITHOUT its compiled kernels: {reason}\n"
        "WARNING: every op runs on the slower PyTorch reference. To mend it, install a C++ compiler"
        " and torch, then:\nWARNING:     pip install --no-build-isolation -e .\n",
        file=sys.stderr,
    )
    return [], {}


def purge(folder: Path, keep: set[str]) -> None:
    """Delete compiled modules left in ``folder`` by earlier builds, except those in ``keep``."""
    for stale in folder.glob("_C*"):
        if stale.suffix in (".so", ".pyd") and stale.name not in keep:
            stale.unlink()


def files(pattern: str) -> list[str]:
    """Return the source files that match, relative to the project."""
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


def toolkit(home: str | None) -> str | None:
    """Return the folder of the CUDA toolkit.

    PyTorch takes it to be above the nvcc on PATH; where that one is a script that calls the real
    one, the libraries are elsewhere, and nvcc says where it runs.
    """
    if home is None or any(Path(home, lib, "libcudart.so").exists() for lib in ("lib64", "lib")):
        return home
    try:
        dry = [str(Path(home, "bin", "nvcc")), "--dryrun", "-x", "cu", os.devnull]
        said = subprocess.run(dry, capture_output=True, text=True, check=False).stderr
    except OSError:
        return home
    tops = [line.partition("TOP=")[2] for line in said.splitlines() if "TOP=" in line]
    return str(Path(tops[0]).resolve()) if tops else home


def cuda_module(cpp: Any, common: dict[str, Any]) -> Extension:
    """Return the CUDA part, which knows the architectures that it is compiled for."""
    # PyTorch's default is the GPU of this machine, and there may be none.
    wanted = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
    known = f'-DPSAP_CUDA_ARCHITECTURES="{wanted}"'
    flags = common["extra_compile_args"]
    flags = {"cxx": [*flags["cxx"], "-DUSE_CUDA", known], "nvcc": flags["nvcc"]}
    sources = ["csrc/cuda/module.cpp", *files("csrc/cuda/*.cu")]
    options = {**common, "extra_compile_args": flags}
    made: Extension = cpp.CUDAExtension(f"{PACKAGE}._C_cuda", sources, **options)
    return made


def extension_modules() -> tuple[list[Extension], dict[str, Any]]:
    """Return the extension modules that this machine can build, and the command that does it."""
    try:
        import torch
        from torch.utils import cpp_extension as cpp
    except ImportError as error:
        wanted = parts_to_build(os.environ, torch_cuda=None, has_nvcc=False, has_cuda_sources=False)
        return warn(f"torch cannot be imported ({error})" if wanted else "PSAP_NO_EXT=1")
    cpp.CUDA_HOME = toolkit(cpp.CUDA_HOME)
    parts = parts_to_build(
        os.environ,
        torch_cuda=torch.version.cuda,
        has_nvcc=cpp.CUDA_HOME is not None and Path(cpp.CUDA_HOME, "bin", "nvcc").exists(),
        has_cuda_sources=bool(files("csrc/cuda/*.cu")),
    )
    if not parts:
        return warn("PSAP_NO_EXT=1")
    # -isystem beats the -I that PyTorch adds for the same folders: no warnings from its headers.
    system = [f"-isystem{path}" for path in cpp.include_paths()]
    cxx = [*CXX_FLAGS, *STABLE_ABI, *system, f"-ffile-prefix-map={ROOT}/="]
    common: dict[str, Any] = {
        "depends": ["setup.py", *files("csrc/**/*.h"), *files("csrc/**/*.cuh")],
        "py_limited_api": True,
        "extra_compile_args": {"cxx": cxx, "nvcc": [*NVCC_FLAGS, *STABLE_ABI]},
    }
    sources = ["csrc/module.cpp", *files("csrc/cpu/*.cpp")]
    modules = [cpp.CppExtension(f"{PACKAGE}._C", sources, **common)]
    if "_C_cuda" in parts:
        modules.append(cuda_module(cpp, common))

    class BuildOrWarn(cpp.BuildExtension):
        """A failed compile leaves no stale module behind and is reported, not fatal."""

        def run(self) -> None:
            """Build, or warn; in place, keep the objects where the next build finds them."""
            self.force = False  # PyTorch sets it, and would link again every time
            lib, temp = self.build_lib, self.build_temp
            if self.inplace:
                self.build_lib, self.build_temp = "build/inplace", "build/inplace-objects"
            try:
                super().run()
            except Exception as error:
                purge(Path(self.build_lib, PACKAGE), keep=set())
                purge(ROOT / PACKAGE, keep=set())
                self.extensions = []
                warn(f"compiling failed ({error})")
            finally:
                self.build_lib, self.build_temp = lib, temp

    return modules, {"build_ext": BuildOrWarn}


class PurgingBuildPy(build_py):
    """Keeps modules of an earlier build, for another configuration, out of this one."""

    def run(self) -> None:
        """Purge, then copy the Python files as always."""
        names = {f"{m.name.split('.')[-1]}.abi3.so" for m in self.distribution.ext_modules or ()}
        purge(Path(self.build_lib, PACKAGE), keep=names)
        purge(ROOT / PACKAGE, keep=names)
        super().run()


if __name__ == "__main__":
    ext_modules, commands = extension_modules()
    setup(
        ext_modules=ext_modules,
        cmdclass={"build_py": PurgingBuildPy, **commands},
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if ext_modules else {},
    )
