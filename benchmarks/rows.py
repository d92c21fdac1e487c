"""One benchmark row: a JSON line with what was run, on what, and what came out."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import psap
import psap_kernels

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Versions and the processor, for every row."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "psap": psap.__version__,
        "commit": commit.stdout.strip() or None,
        "kernels": psap_kernels.build_info()["parts"]["_C"]["capability"],
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "date": time.strftime("%Y-%m-%d"),
    }


def write(name: str, row: Mapping[str, Any]) -> None:
    """Append one row to ``results/<name>.jsonl`` and print it."""
    RESULTS.mkdir(exist_ok=True)
    line = json.dumps({"benchmark": name, **row, **machine()})
    with (RESULTS / f"{name}.jsonl").open("a") as file:
        file.write(line + "\n")
    print(line, flush=True)


def cpu_ms(
    candidates: Mapping[str, Callable[[], Any]], repeats: int
) -> dict[str, dict[str, float]]:
    """CPU milliseconds of each candidate, interleaved in one process.

    Returns:
        For each its median, and the 20th and 80th percentile.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(repeats + 2):
        for name, run in candidates.items():
            start = time.process_time()
            run()
            if turn >= 2:
                times[name].append((time.process_time() - start) * 1e3)
    result = {}
    for name, values in times.items():
        fifths = statistics.quantiles(values, n=5)
        result[name] = {"median": statistics.median(values), "p20": fifths[0], "p80": fifths[3]}
    return result
