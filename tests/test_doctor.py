"""The doctor: what is there, what is missing, what mends it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import psap_kernels
from psap import doctor
from psap.cli import main
from psap_kernels._library import SCHEMAS

ROOT = Path(__file__).parents[1]
NOT_BUILT = {
    "available": False,
    "path": None,
    "torch_built": None,
    "capability": None,
    "why_missing": "psap_kernels._C was not built when psap was installed",
}


def shown(found: dict[str, Any]) -> str:
    out = io.StringIO()
    doctor.show(found, Console(file=out, width=200))
    return out.getvalue()


def test_lists_every_op_on_both_devices() -> None:
    found = doctor.report()
    assert [(row["op"], row["device"]) for row in found["ops"]] == [
        (op, device) for op in SCHEMAS for device in ("cpu", "cuda")
    ]
    assert all(row["why"] for row in found["ops"])
    text = shown(found)
    for word in (*SCHEMAS, *doctor.EXTRAS, "compiler", "nvcc", torch.__version__):
        assert word in text


def test_tells_the_backend_that_the_dispatcher_takes() -> None:
    built = psap_kernels.build_info()["parts"]["_C"]["available"]
    for row in doctor.report()["ops"]:
        if row["device"] == "cpu":
            assert row["backend"] == ("C++" if built else "reference")
        elif torch.version.cuda is None:
            assert (row["backend"], row["why"]) == (None, "this torch is built without CUDA")


def test_missing_part(monkeypatch: pytest.MonkeyPatch) -> None:
    info = {"torch": torch.__version__, "parts": {"_C": NOT_BUILT}, "mend": "pip install -e ."}
    monkeypatch.setattr(psap_kernels, "build_info", lambda: info)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    found = doctor.report()
    rows = [row for row in found["ops"] if row["device"] == "cpu"]
    assert {(row["backend"], row["why"]) for row in rows} == {
        ("reference", "psap_kernels._C was not built when psap was installed")
    }
    assert found["problems"][0] == {
        "what": "psap_kernels._C: psap_kernels._C was not built when psap was installed",
        "mend": "pip install -e .",
    }
    assert found["problems"][1]["what"] == "no C++ compiler was found"
    text = shown(found)
    assert "to mend: pip install -e ." in text and "not found" in text


def test_missing_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    version = metadata.version

    def without(name: str) -> str:
        if name == "pyarrow":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(doctor.metadata, "version", without)
    found = doctor.report()
    assert found["extras"]["pyarrow"]["version"] is None
    problem = {
        "what": "pyarrow (CIFAR-10 in parquet files)",
        "mend": "pip install 'psap[data]'",
    }
    assert problem in found["problems"]
    assert main(["doctor"]) == 0
    assert "pip install 'psap[data]'" in capsys.readouterr().out
    assert main(["doctor", "--strict"]) == 1


def test_nothing_missing_says_so() -> None:
    assert "Nothing is missing." in shown({**doctor.report(), "problems": []})


def test_a_compiler_that_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "c++"
    broken.write_bytes(b"\x00")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    tool = doctor.report()["tools"]["compiler"]
    assert tool["path"] == str(broken) and tool["version"].startswith("does not run: ")


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    assert set(found) == {"versions", "cuda", "parts", "ops", "extras", "tools", "problems"}


def test_makes_no_cuda_context() -> None:
    code = "from psap import doctor; doctor.report(); import torch; "
    code += "assert not torch.cuda.is_initialized()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "built, triton, wanted",
    [(True, True, "CUDA"), (False, True, "Triton"), (False, False, "reference")],
)
def test_what_serves_a_gpu(
    monkeypatch: pytest.MonkeyPatch, built: bool, triton: bool, wanted: str
) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: triton or None)
    part = {"available": built, "architectures": "9.0", "why_missing": "it was not built"}
    backend, why = doctor._on_cuda(True, {"_C_cuda": part}, {"built": "13.0"})
    assert backend == wanted
    assert why == ("psap_kernels._C_cuda is built, for 9.0" if built else "it was not built")
