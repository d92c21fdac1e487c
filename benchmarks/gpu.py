"""The first day on a machine with a GPU: is it ready, compute-sanitizer, all timings, a table."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from benchmarks import registry, roofline
from psap_kernels import _load

BENCHMARKS = ("stats", "shrink", "supervise", "histogram", "host")
DEADLINE_S = 420  # the tests have the rest of ten minutes
TOOLS = ("memcheck", "racecheck", "initcheck")
DRIVER = Path(__file__).parent / "sanitized.py"
DEFAULTS = registry.Options(
    device="cuda",
    networks=("resnet50", "vgg16", "resnet56"),
    dtype=("float32", "channels_last", "bfloat16"),
    compile=True,
)


def missing(device: str) -> list[str]:
    """What the machine lacks, in words."""
    if device == "cpu":
        return []
    if torch.version.cuda is None:
        return [f"torch {torch.__version__} was built without CUDA: install a CUDA build"]
    if not torch.cuda.is_available():
        return [f"torch {torch.__version__} sees no CUDA device: is there an NVIDIA GPU, a driver?"]
    part = _load.part("_C_cuda")
    return [f"{part.why_missing}: {_load.MEND}"] if part.module is None else []


def require(device: str = "cuda") -> None:
    """Print what will be tested; exit code 1, with what is missing, where it cannot be.

    Raises:
        NoDevice: something is missing.
    """
    lacks = missing(device)
    if lacks:
        raise registry.NoDevice("not ready for the GPU: " + "; ".join(lacks))
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, {', '.join(names) or 'CPU only'}")


def backends(device: str) -> tuple[str, ...]:
    """Every kernel that the device has; "auto" is among them."""
    if device == "cpu":
        return ("auto",)
    found = ["cuda"] if _load.part("_C_cuda").module is not None else []
    if _load.triton_missing() is None and _load.triton_op("layer_stats") is not None:
        found.append("triton")
    return tuple(found) or ("auto",)


def run(
    options: Annotated[registry.Options, tyro.conf.arg(name="")] = DEFAULTS,
    deadline_s: float = DEADLINE_S,
) -> list[dict[str, Any]]:
    """Time everything on the GPU; rows go to ``<out>/gpu/``, a table to ``<out>/gpu/table.md``.

    Raises:
        NoDevice: the GPU, a CUDA build of torch or the compiled kernels are missing.
        CheckFailed: a result was wrong.
    """
    require(options.device)
    start = time.monotonic()
    folder = options.out / "gpu"
    options = dataclasses.replace(options, out=folder, backend=backends(options.device))
    found = roofline.run(options)
    for name in BENCHMARKS:
        for dtype in options.dtype if name != "host" else options.dtype[:1]:
            spent = time.monotonic() - start
            if spent > deadline_s:
                print(f"left out after {spent:.0f} s: {name} {dtype}", file=sys.stderr)
                continue
            # Compiling takes longest and tells least in the other dtypes.
            compiles = options.compile and dtype == "float32" and name == "stats"
            part = dataclasses.replace(options, dtype=(dtype,), compile=compiles)
            found += registry.run(name, part)
    (folder / "table.md").write_text(table(found))
    print((folder / "table.md").read_text())
    return found


def table(found: list[dict[str, Any]]) -> str:
    """The timed rows as a Markdown table."""
    header = [
        "op",
        "case",
        "dtype",
        "backend",
        "ms",
        "kernel alone, ms",
        "% of the limit",
        "ratios",
    ]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for row in found:
        if "median_ms" not in row:
            continue
        alone = row.get("device_ms")
        share = row.get("device_percent_of_limit", row["percent_of_limit"])
        ratios = ", ".join(f"{k} {v['ratio']:.3g}x" for k, v in row["baselines"].items())
        layout = " channels_last" if row["layout"] == "channels_last" else ""
        cells = [
            f"`{row['op']}`",
            row["case"],
            row["dtype"] + layout,
            row["backend"],
            f"{row['median_ms']:.4g}",
            "" if alone is None else f"{alone:.4g}",
            "" if share is None else f"{share:.0f}",
            ratios,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    where = dict.fromkeys(
        f"{row['gpu'] or row['cpu']}, torch {row['torch']}, {row['date']}" for row in found
    )
    return "\n".join([*where, "", *lines, ""])


def sanitizer() -> str | None:
    """Where compute-sanitizer is."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    places = [os.environ.get("PATH", ""), str(Path(home, "bin"))]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def sanitize(device: str = "cuda", timeout_s: float = 120, skip: str = "") -> None:
    """Run every op under compute-sanitizer: memcheck, racecheck, initcheck.

    Args:
        device: on "cpu" the ops run without the tool, which has nothing to do there.
        timeout_s: seconds for each run.
        skip: the reason why the ops are to run without the tool.

    Raises:
        NoDevice: there is no GPU, or no compute-sanitizer and no reason to do without.
        CheckFailed: a tool, or the comparison with the reference, found something.
    """
    require(device)
    tool = None if skip or device == "cpu" else sanitizer()
    if tool is None and not skip and device != "cpu":
        raise registry.NoDevice(
            "compute-sanitizer was not found, so nothing was checked: put the CUDA toolkit on PATH,"
            " or set CUDA_HOME, or give the reason to do without: --skip REASON"
        )
    for backend in backends(device):
        driver = [sys.executable, str(DRIVER), device, backend]
        if tool is None:
            print(f"WITHOUT compute-sanitizer: {skip or 'no GPU is asked for'}", file=sys.stderr)
            _require_success(driver, timeout_s)
            continue
        for name in TOOLS if backend == "cuda" else TOOLS[:1]:
            options = ["--tool", name, "--error-exitcode", "1"]
            # Only our kernels: those of PyTorch are slow under the tool and not ours to mend.
            options += ["--kernel-regex", "kns=psap"] if backend == "cuda" else []
            _require_success([tool, *options, *driver], timeout_s)


def _require_success(command: list[str], timeout_s: float) -> None:
    root = str(Path(__file__).parents[1])
    # Every tensor is then an allocation of its own, so that a read beyond it shows.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": root}
    try:
        done = subprocess.run(command, env=environment, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise registry.CheckFailed(f"{' '.join(command)}: not done in {timeout_s} s") from error
    if done.returncode:
        raise registry.CheckFailed(f"{' '.join(command)}: exit code {done.returncode}")
