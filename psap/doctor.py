"""What is installed and built, what each op therefore uses, and what mends the rest."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
from importlib import metadata
from typing import Any

import numpy
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import psap
import psap_kernels
from psap_kernels._library import SCHEMAS

EXTRAS = {
    "onnx": "pip install 'psap[onnx]'",
    "onnxruntime": "pip install 'psap[onnx]'",
    "onnxscript": "pip install 'psap[onnx]'",
    "pyarrow": "pip install 'psap[data]'",
    "pillow": "pip install 'psap[data]'",
    "triton": "pip install triton",
}
USES = {
    "onnx": "export to ONNX",
    "onnxruntime": "checks of exported ONNX files",
    "onnxscript": "export to ONNX",
    "pyarrow": "CIFAR-10 in parquet files",
    "pillow": "compressed images",
    "triton": "kernels on a GPU without nvcc",
}


def report() -> dict[str, Any]:
    """The state of the installation as JSON values; no CUDA context is made.

    Returns:
        A dict with ``versions``; ``cuda`` (``available`` and ``why``); ``parts`` (those of
        `psap_kernels.build_info`); ``ops``, a list of ``op``, ``device``, ``backend`` and ``why``;
        ``extras`` and ``tools``, with None for the version of what is missing; and ``problems``, a
        list of ``what`` and ``mend``.
    """
    built = psap_kernels.build_info()
    cuda = _cuda()
    found: dict[str, Any] = {
        "versions": {
            "psap": psap.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "platform": f"{platform.system()} {platform.machine()}",
        },
        "cuda": cuda,
        "parts": built["parts"],
        "ops": _ops(built["parts"], cuda),
        "extras": _extras(),
        "tools": {"compiler": _tool(_compiler()), "nvcc": _tool(_nvcc())},
    }
    found["problems"] = _problems(found, built["mend"])
    return found


def _cuda() -> dict[str, Any]:
    if torch.version.cuda is None:
        return {"built": None, "available": False, "why": "this torch is built without CUDA"}
    available = torch.cuda.is_available()
    why = None if available else "no CUDA device or driver was found"
    return {"built": torch.version.cuda, "available": available, "why": why}


def _ops(parts: dict[str, Any], cuda: dict[str, Any]) -> list[dict[str, Any]]:
    """The implementation that the dispatcher takes for every op on every device."""
    rows = []
    for op in SCHEMAS:
        for device, choose in (("cpu", _on_cpu), ("cuda", _on_cuda)):
            compiled = torch._C._dispatch_has_kernel_for_dispatch_key(f"psap::{op}", device.upper())
            backend, why = choose(compiled, parts, cuda)
            rows.append({"op": op, "device": device, "backend": backend, "why": why})
    return rows


def _on_cpu(compiled: bool, parts: dict[str, Any], cuda: dict[str, Any]) -> tuple[str | None, str]:
    if compiled:
        return "C++", f"psap_kernels._C is built, with {parts['_C']['capability']} kernels"
    return "reference", str(parts["_C"]["why_missing"] or "psap_kernels._C does not have it")


def _on_cuda(compiled: bool, parts: dict[str, Any], cuda: dict[str, Any]) -> tuple[str | None, str]:
    if cuda["built"] is None:
        return None, cuda["why"]
    part = parts["_C_cuda"]
    if part["available"]:
        return "CUDA", f"psap_kernels._C_cuda is built, for {part['architectures']}"
    if importlib.util.find_spec("triton") is not None:
        return "Triton", str(part["why_missing"])
    return "reference", str(part["why_missing"])


def _extras() -> dict[str, Any]:
    found = {}
    for name, command in EXTRAS.items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            version = None
        found[name] = {"version": version, "for": USES[name], "mend": None if version else command}
    return found


def _compiler() -> str | None:
    names = [os.environ.get("CXX", ""), "c++", "g++", "clang++", "cl"]
    return next((path for name in names if name and (path := shutil.which(name))), None)


def _nvcc() -> str | None:
    homes = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")]
    candidates = [os.path.join(home, "bin", "nvcc") for home in homes if home]
    return next((p for c in [*candidates, "nvcc"] if (p := shutil.which(c))), None)


def _tool(path: str | None) -> dict[str, str | None]:
    """Where a program is, and the line of its ``--version`` that has a number in it."""
    if path is None:
        return {"path": None, "version": None}
    try:
        run = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20)
        lines = [line for line in run.stdout.splitlines() if any(c.isdigit() for c in line)]
    except (OSError, subprocess.SubprocessError) as error:
        return {"path": path, "version": f"does not run: {error}"}
    release = [line for line in lines if "release" in line]
    return {"path": path, "version": (release or lines or ["unknown"])[0].strip()}


def _problems(found: dict[str, Any], mend: str | None) -> list[dict[str, str]]:
    problems = []
    missing = [name for name, part in found["parts"].items() if not part["available"]]
    needed = [name for name in missing if name == "_C" or found["cuda"]["available"]]
    for name in needed:
        why = found["parts"][name]["why_missing"]
        problems.append({"what": f"psap_kernels.{name}: {why}", "mend": str(mend)})
    if needed and found["tools"]["compiler"]["path"] is None:
        command = "xcode-select --install" if platform.system() == "Darwin" else "apt install g++"
        problems.append({"what": "no C++ compiler was found", "mend": f"{command}, or set CXX"})
    if "_C_cuda" in needed and found["tools"]["nvcc"]["path"] is None:
        problems.append(
            {
                "what": "no nvcc was found",
                "mend": f"install the CUDA {found['cuda']['built']} toolkit, or set CUDA_HOME",
            }
        )
    for name, extra in found["extras"].items():
        if extra["version"] is None and (name != "triton" or found["cuda"]["available"]):
            problems.append({"what": f"{name} ({extra['for']})", "mend": extra["mend"]})
    return problems


def show(found: dict[str, Any], console: Console) -> None:
    """Print a report for people."""
    versions = "  ".join(f"[b]{k}[/] {escape(v)}" for k, v in found["versions"].items())
    cuda = found["cuda"]
    console.print(versions, highlight=False)
    console.print(
        f"[b]cuda[/] {cuda['built'] or 'no'}: {cuda['why'] or 'available'}", highlight=False
    )
    console.print(_parts_table(found["parts"]), _ops_table(found["ops"]))
    console.print(_packages_table(found["extras"], found["tools"]))
    if not found["problems"]:
        console.print("[green]Nothing is missing.[/]")
        return
    console.print("[b]Missing:[/]")
    for problem in found["problems"]:
        console.print(f"  {escape(problem['what'])}", highlight=False)
        console.print(f"    [b]to mend:[/] {escape(problem['mend'])}", highlight=False)


def _parts_table(parts: dict[str, Any]) -> Table:
    table = Table(title="Compiled parts", title_justify="left")
    for name in ("part", "state", "built with torch", "instructions", "where, or why not"):
        table.add_column(name, overflow="fold")
    for name, part in parts.items():
        state = "[green]built[/]" if part["available"] else "[red]missing[/]"
        cells = (part["torch_built"], part["capability"], part["path"] or part["why_missing"])
        table.add_row(name, state, *(escape(str(cell or "-")) for cell in cells))
    return table


def _ops_table(ops: list[dict[str, Any]]) -> Table:
    table = Table(title="Ops", title_justify="left")
    for name in ("op", "device", "backend", "why"):
        table.add_column(name, overflow="fold")
    for device in dict.fromkeys(row["device"] for row in ops):
        for row in (row for row in ops if row["device"] == device):
            table.add_row(row["op"], device, row["backend"] or "-", escape(row["why"]))
        table.add_section()
    return table


def _packages_table(extras: dict[str, Any], tools: dict[str, Any]) -> Table:
    table = Table(title="Optional packages and tools", title_justify="left")
    for name in ("name", "version", "needed for", "to install"):
        table.add_column(name, overflow="fold")
    for name, extra in extras.items():
        version = extra["version"] or "[yellow]missing[/]"
        table.add_row(name, version, extra["for"], escape(extra["mend"] or ""))
    for name, use in (("compiler", "building _C"), ("nvcc", "building _C_cuda")):
        version = escape(tools[name]["version"]) if tools[name]["path"] else "[yellow]not found[/]"
        table.add_row(name, version, use, "")
    return table
