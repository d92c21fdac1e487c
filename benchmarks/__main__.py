"""``python -m benchmarks stats | shrink | ...``: run a benchmark, append its rows to results/."""

from __future__ import annotations

import os

# Before torch starts its threads: idle ones sleep and leave the cores to other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks import (
    accuracy,
    accuracy_plot,
    coverage,
    coverage_table,
    digits,
    gpu,
    overhead,
    plot,
    registry,
    roofline,
    rows,
    speed,
    surgery,
)
from benchmarks import histogram as histogram
from benchmarks import host as host
from benchmarks import shrink as shrink
from benchmarks import stats as stats
from benchmarks import supervise as supervise

Flat = Annotated[registry.Options, tyro.conf.arg(name="")]


def _timed(name: str) -> Callable[..., None]:
    def run(options: Flat = registry.Options()) -> None:  # noqa: B008 (frozen)
        registry.run(name, options)

    run.__doc__ = sys.modules[f"benchmarks.{name}"].__doc__
    return run


def check(folder: tyro.conf.Positional[Path] = rows.RESULTS) -> None:
    """Say which rows lack a required key; exit code 1 if one does."""
    faults = rows.faults(folder)
    print("\n".join(faults) or f"{len(rows.read(folder))} rows, all complete")
    if faults:
        raise SystemExit(1)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a red check or a missing device is an error message and code 1."""
    commands: dict[str, Callable[..., Any]] = {
        **{name: _timed(name) for name in registry.REGISTRY},
        "overhead": overhead.run,
        "roofline": roofline.run,
        "digits": digits.run,
        "coverage": coverage.run,
        "coverage-table": coverage_table.run,
        "accuracy": accuracy.run,
        "surgery": surgery.run,
        "accuracy-plot": accuracy_plot.run,
        "speed": speed.run,
        "gpu": gpu.run,
        "gpu-ready": gpu.require,
        "sanitize": gpu.sanitize,
        "plot": plot.run,
        "check": check,
    }
    try:
        tyro.extras.subcommand_cli_from_dict(commands, args=arguments)
    except (registry.CheckFailed, registry.NoDevice, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
