"""Every Triton kernel, compiled for GPUs that are not there: no spills, no stack, vector loads.

The limits of registers are in tests/data/triton_registers.json; after a change that is meant,
`TRITON_INTERPRET=0 python tests/kernels/triton_aot.py --write` measures them anew.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is a test dependency on Linux")

SCRIPT = Path(__file__).with_name("triton_aot.py")
LIMITS = json.loads((Path(__file__).parents[1] / "data" / "triton_registers.json").read_text())
# Kernels with a body for whole vectors: what it must hold, on NVIDIA.
VECTORS = {
    ("layer_stats", " w g"): ("loads", "LDG.E.128"),
    ("layer_stats", " w"): ("loads", "LDG.E.128"),
    ("layer_stats input columns", ""): ("loads", "LDG.E.128"),
    ("abs_histogram", ""): ("loads", "LDG.E.128"),
    ("gate_stats_", " long rows"): ("loads", "LDG.E.128"),
    ("restore_filters_", ""): ("loads", "LDG.E.128"),
    ("zero_filters_", ""): ("stores", "STG.E.128"),
}


def builds(target: str, folder: Path) -> list[dict[str, Any]]:
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(folder),
        "PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[2]), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", SCRIPT, target],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_builds(target, tmp_path):
    found = builds(target, tmp_path)
    assert [build["kernel"] for build in found] == list(LIMITS)
    for build in found:
        name = build["kernel"]
        assert (build["spills"], build["stack"]) == (0, 0), build
        assert build["registers"] <= LIMITS[name][target], build
        if target != "gfx942":
            check_nvidia(name, build)


def check_nvidia(name: str, build: dict[str, Any]) -> None:
    for (start, end), (kind, instruction) in VECTORS.items():
        if name.startswith(start) and name.endswith(end):
            assert build[kind].get(instruction, 0) >= 1, build
            if kind == "loads":
                check_generic_body(name, build)


def check_generic_body(name: str, build: dict[str, Any]) -> None:
    """A hint that leaks into the generic body would make it read vectors at any address."""
    if "float16" in name:  # bfloat16, too
        assert build["loads"].get("LDG.E.U16", 0) >= 1, build
    elif "float32" in name:  # beside at most three 32-bit loads of tables
        assert build["loads"].get("LDG.E", 0) >= 6, build
