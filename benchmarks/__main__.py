"""``python -m benchmarks kernels | digits``: run a benchmark, append its rows to results/."""

from __future__ import annotations

import tyro

from benchmarks import digits, kernels

tyro.extras.subcommand_cli_from_dict({"kernels": kernels.run, "digits": digits.run})
