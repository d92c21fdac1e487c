"""The demo for several seeds: accuracy, cost, time. Each seed is a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import rows

SCRIPT = Path(__file__).parents[1] / "examples" / "digits.py"


def run(seeds: int = 5) -> None:
    """Run ``examples/digits.py`` for seeds 0 to ``seeds - 1`` and write a row for each."""
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            start = time.monotonic()
            command = [sys.executable, str(SCRIPT), "--out", folder, "--seed", str(seed)]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            seconds = time.monotonic() - start
            found = json.loads((Path(folder) / "record.json").read_text())
            rows.write(
                "digits",
                {
                    "command": f"python examples/digits.py --seed {seed}",
                    "seed": seed,
                    "promises_kept": done.returncode == 0,
                    "seconds": seconds,
                    "dense": found["compare"]["dense"],
                    "small": found["compare"]["small"],
                    "batch": found["compare"].get("batch"),
                    "threads": found["compare"].get("threads"),
                    "relative_error": found["verification"]["max_relative_error"],
                    "onnx_difference": found["onnx"]["max_abs_difference"],
                },
            )
