"""One benchmark row: a JSON line with what was run, on what, and what came out."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import psap
import psap_kernels

RESULTS = Path(__file__).parent / "results"

ALWAYS = ("benchmark", "torch", "psap", "commit", "date")
MACHINE = ("cpu", "cores")
# A row of a timed op has these too.
TIMED = (
    "command",
    "op",
    "case",
    "shape",
    "dtype",
    "layout",
    "device",
    "threads",
    "clock",
    "backend",
    "bytes",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "limit",
    "percent_of_limit",
    "baselines",
)


def machine() -> dict[str, Any]:
    """Versions, the command and the processor, for every row."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "gpu": gpu,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "psap": psap.__version__,
        "commit": _commit(),
        "kernels": psap_kernels.build_info()["parts"]["_C"]["capability"],
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "date": time.strftime("%Y-%m-%d"),
    }


def _commit() -> str | None:
    """The commit, "-dirty" if other files than results differ from it."""

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["git", "-C", str(RESULTS.parents[1]), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    head = git("rev-parse", "--short", "HEAD").stdout.strip()
    same = git("diff", "--quiet", "HEAD", "--", ".", ":!benchmarks/results").returncode == 0
    return (head if same else f"{head}-dirty") if head else None


def command() -> str:
    """The command line, as one would type it."""
    return "python -m benchmarks " + shlex.join(sys.argv[1:])


def write(name: str, row: Mapping[str, Any], folder: Path | None = None) -> dict[str, Any]:
    """Append one row to ``<folder>/<name>.jsonl`` and print it; return it whole."""
    folder = folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    whole = {"benchmark": name, "command": command(), **row, **machine()}
    line = json.dumps(whole)
    with (folder / f"{name}.jsonl").open("a") as file:
        file.write(line + "\n")
    print(line, flush=True)
    return whole


def read(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """All rows of a folder and those inside, in the order of files and lines."""
    return [
        json.loads(line)
        for path in sorted(folder.rglob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]


def faults(folder: Path = RESULTS) -> list[str]:
    """What is wrong with the rows of a folder, one line a fault."""
    found = []
    for path in sorted(folder.rglob("*.jsonl")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                found.append(f"{path.name}:{number}: not JSON ({error})")
                continue
            wanted = (*ALWAYS, *MACHINE, *(TIMED if "median_ms" in row else ()))
            missing = [key for key in wanted if key not in row]
            if missing:
                found.append(f"{path.name}:{number}: without {', '.join(missing)}")
            elif "median_ms" in row and not row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]:
                found.append(f"{path.name}:{number}: the median is not between p20 and p80")
    return found
