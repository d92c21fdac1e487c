"""setup.py: what it decides to build, and an install on a machine without a compiler."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").exists(), reason="needs the source tree, not an installed copy"
)


@pytest.fixture
def setup() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("psap_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


EVERYTHING = {"torch_cuda": "13.0", "has_nvcc": True, "has_cuda_sources": True}


@pytest.mark.parametrize(
    ("env", "facts", "parts"),
    [
        ({}, {}, ["_C", "_C_cuda"]),
        ({"PSAP_CUDA": "1"}, {}, ["_C", "_C_cuda"]),
        ({"PSAP_CUDA": "0"}, {}, ["_C"]),
        ({}, {"torch_cuda": None}, ["_C"]),
        ({}, {"has_nvcc": False}, ["_C"]),
        ({}, {"has_cuda_sources": False}, ["_C"]),
        ({"PSAP_NO_EXT": "1"}, {}, []),
        ({"PSAP_NO_EXT": "0", "PSAP_REQUIRE_EXT": "1"}, {}, ["_C", "_C_cuda"]),
    ],
)
def test_parts_to_build(setup, env, facts, parts):
    assert setup.parts_to_build(env, **{**EVERYTHING, **facts}) == parts


@pytest.mark.parametrize("says", ["#$ TOP={real}/bin/..", "nothing of use"])
def test_the_toolkit_behind_a_script_named_nvcc(setup, tmp_path, says):
    real, path = tmp_path / "cuda-13.0", tmp_path / "local"
    for folder in (real / "lib", real / "bin", path / "bin"):
        folder.mkdir(parents=True)
    script = path / "bin" / "nvcc"
    script.write_text(f"#!/bin/sh\necho '{says.format(real=real)}' >&2\n")
    script.chmod(0o755)
    assert setup.toolkit(str(path)) == str(real if "TOP" in says else path)
    (path / "lib").mkdir()
    (path / "lib" / "libcudart.so").touch()
    assert setup.toolkit(str(path)) == str(path)
    assert setup.toolkit(None) is None
    assert setup.toolkit(str(tmp_path / "none")) == str(tmp_path / "none")


@pytest.mark.parametrize(
    ("env", "facts", "match"),
    [
        ({"PSAP_CUDA": "1"}, {"torch_cuda": None}, r"missing: a PyTorch built with CUDA"),
        ({"PSAP_CUDA": "1"}, {"has_nvcc": False}, r"missing: nvcc \(set CUDA_HOME"),
        ({"PSAP_CUDA": "1"}, {"has_cuda_sources": False}, r"missing: csrc/cuda/\*\.cu"),
        ({"PSAP_CUDA": "yes"}, {}, r"PSAP_CUDA is 'yes', wanted 0 or 1"),
        ({"PSAP_NO_EXT": "1", "PSAP_CUDA": "1"}, {}, r"PSAP_NO_EXT=1 contradicts"),
        ({"PSAP_NO_EXT": "1", "PSAP_REQUIRE_EXT": "1"}, {}, r"PSAP_NO_EXT=1 contradicts"),
    ],
)
def test_demands_that_cannot_be_met(setup, env, facts, match):
    with pytest.raises(setup.BuildError, match=match):
        setup.parts_to_build(env, **{**EVERYTHING, **facts})


def test_without_torch_it_installs_and_says_so(setup, monkeypatch, capsys):
    for name in ("PSAP_NO_EXT", "PSAP_CUDA", "PSAP_REQUIRE_EXT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert setup.extension_modules() == ([], {})
    assert "WITHOUT its compiled kernels: torch cannot be imported" in capsys.readouterr().err
    monkeypatch.setenv("PSAP_REQUIRE_EXT", "1")
    with pytest.raises(setup.BuildError, match=r"PSAP_REQUIRE_EXT=1, but torch cannot be imported"):
        setup.extension_modules()


def test_no_ext_says_so(setup, monkeypatch, capsys):
    for name in ("PSAP_CUDA", "PSAP_REQUIRE_EXT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PSAP_NO_EXT", "1")
    assert setup.extension_modules() == ([], {})
    assert "WITHOUT its compiled kernels: PSAP_NO_EXT=1" in capsys.readouterr().err


def test_cuda_on_demand_looks_at_this_machine(setup, monkeypatch, tmp_path):
    """A CUDA PyTorch and nvcc are found; what is missing is the sources."""
    import torch
    from torch.utils import cpp_extension

    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvcc").touch()
    monkeypatch.delenv("PSAP_NO_EXT", raising=False)
    monkeypatch.setenv("PSAP_CUDA", "1")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(setup, "files", lambda pattern: [])
    with pytest.raises(setup.BuildError, match=r"these are missing: csrc/cuda"):
        setup.extension_modules()


def test_purge_deletes_compiled_modules_only(setup, tmp_path):
    names = ["_C.abi3.so", "_C.cpython-311-x86_64-linux-gnu.so", "_C_cuda.abi3.so", "_checks.py"]
    for name in names:
        (tmp_path / name).touch()
    setup.purge(tmp_path, keep={"_C.abi3.so"})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["_C.abi3.so", "_checks.py"]


PYPROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "psap"
version = "0"
[tool.setuptools.packages.find]
include = ["psap_kernels*"]
[tool.pytest.ini_options]
filterwarnings = ["error"]
markers = ["slow: -"]
"""


def run(arguments: list[str], cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run Python without a compiler in PATH and without the environment of this build."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PSAP_", "PYTHON", "CXX"))}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**kept, "PATH": str(cwd / "no-programs"), **env},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the sources with modules in it that an earlier build left behind."""
    folder = tmp_path / "source"
    unwanted = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("psap_kernels", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=unwanted)
    shutil.copytree(ROOT / "tests/kernels", tmp_path / "tests/kernels", ignore=unwanted)
    shutil.copy(ROOT / "setup.py", folder)
    for place in (folder, tmp_path):
        (place / "pyproject.toml").write_text(PYPROJECT)
    for suffix in (".abi3.so", f".cpython-3{sys.version_info.minor}-x86_64-linux-gnu.so"):
        (folder / "psap_kernels" / f"_C{suffix}").write_text("left by another build")
    return folder


def test_without_a_compiler_the_build_says_so(source):
    build = ["setup.py", "build_ext", "--inplace"]
    demanded = run(build, source, PSAP_REQUIRE_EXT="1")
    assert demanded.returncode != 0
    assert "PSAP_REQUIRE_EXT=1, but compiling failed" in demanded.stderr

    done = run(build, source)
    assert done.returncode == 0, done.stderr
    assert "WITHOUT its compiled kernels: compiling failed" in done.stderr
    assert not list(source.glob("psap_kernels/*.so"))

    code = "import psap_kernels as p; print(p.build_info()); p.use_backend('cpu')"
    shown = run(["-c", code], source, PYTHONPATH=str(source))
    assert "psap_kernels._C was not built" in shown.stdout
    assert "RuntimeError: backend 'cpu' is missing" in shown.stderr
    assert "pip install --no-build-isolation" in shown.stderr


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_without_a_compiler_it_installs_and_the_reference_passes(source, tmp_path):
    site = tmp_path / "site"
    pip = ["-m", "pip", "install", "-v", "--no-index", "--no-deps", "--no-build-isolation"]
    done = run([*pip, "--target", str(site), "."], source)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WITHOUT its compiled kernels: compiling failed" in done.stdout + done.stderr
    assert not list(site.rglob("*.so"))

    names = ("abs_histogram", "gate_stats", "layer_stats", "library", "rows_in_place", "shrink_op")
    files = [f"tests/kernels/test_{name}.py" for name in names]
    pytest_arguments = ["-m", "pytest", "-q", "-W", "default", "-k", "opcheck or reference", *files]
    tests = run(pytest_arguments, tmp_path, PYTHONPATH=str(site))
    assert tests.returncode == 0, tests.stdout + tests.stderr
    assert " passed" in tests.stdout
