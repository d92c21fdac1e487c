"""What a benchmark is, and how each is run: verify first, then time, then write the rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

import psap_kernels
from benchmarks import rows, shapes, timing
from benchmarks.timing import Run
from psap_kernels import _load

DTYPES = {
    "float32": torch.float32,
    "channels_last": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


class CheckFailed(RuntimeError):
    """An implementation gave a wrong result: nothing of it is timed."""


class NoDevice(RuntimeError):
    """The device that was asked for is not there."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to run.

    Attributes:
        device: "cpu", "cuda" or "cuda:1".
        networks: names (benchmarks/shapes.py); "scaling" for the sweeps over parameters and layers.
        dtype: element types; "channels_last" is float32 in that memory format.
        backend: implementations of the ops, "auto" is the one that a user gets.
        threads: CPU threads, one run for each number.
        repeats: timed calls of each variant.
        quick: one small network, few repeats.
        compile: torch.compile as a baseline too (minutes of compiling).
        out: folder of the rows.
    """

    device: str = "cpu"
    networks: tuple[str, ...] = shapes.NAMES
    dtype: tuple[Literal["float32", "channels_last", "bfloat16", "float16", "float64"], ...] = (
        "float32",
    )
    backend: tuple[str, ...] = ("auto",)
    threads: tuple[int, ...] = (1,)
    repeats: int = 21
    quick: bool = False
    compile: bool = False
    out: Path = rows.RESULTS

    def names(self) -> Iterator[str]:
        """The networks, with sweeps written out."""
        for name in ("resnet56",) if self.quick else self.networks:
            yield from shapes.SCALING if name == "scaling" else (name,)

    def times(self) -> int:
        """Timed calls of each variant."""
        return 3 if self.quick else self.repeats


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of an op, and what it is compared with.

    Attributes:
        op: name of the public function.
        name: network, and what is special.
        shape: the sizes in words.
        bytes: what the op must move.
        fused: the call.
        baselines: other ways to the same result.
        limit: name of the physical limit and what to time for it.
        verify: returns what is wrong with the result of ``fused``, or None.
        capturable: whether a CUDA graph can hold the call.
    """

    op: str
    name: str
    shape: str
    bytes: int
    fused: Run
    verify: Callable[[], str | None]
    dtype: str = "float32"
    baselines: Mapping[str, Run] = field(default_factory=dict)
    limit: tuple[str, Run] | None = None
    capturable: bool = True


Cases = Callable[[Options, torch.device, int], Iterator[Case]]
REGISTRY: dict[str, Cases] = {}


def register(name: str) -> Callable[[Cases], Cases]:
    """Name a generator of cases; it is given the options, the device and the threads."""

    def add(cases: Cases) -> Cases:
        REGISTRY[name] = cases
        return cases

    return add


def device_of(options: Options) -> torch.device:
    """Return the device.

    Raises:
        NoDevice: it is not there.
    """
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise NoDevice(
            f"--device {options.device}, but torch {torch.__version__} sees no CUDA device: run it"
            " on a machine with an NVIDIA GPU and a CUDA build of torch, or with --device cpu"
        )
    return device


def run(name: str, options: Options) -> list[dict[str, Any]]:
    """Run a registered benchmark.

    Returns:
        The rows that were written.

    Raises:
        CheckFailed: a result was wrong; rows of cases before it stay.
        NoDevice: the device is not there.
    """
    device, before, found = device_of(options), torch.get_num_threads(), []
    try:
        for threads in options.threads:
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            for case in REGISTRY[name](options, device, threads):
                found += _run_case(name, case, options, device, threads)
    finally:
        torch.set_num_threads(before)
    return found


def _with_backend(backend: str, run: Run) -> Run:
    if backend == "auto":
        return run

    def forced() -> Any:
        with psap_kernels.use_backend(backend):
            return run()

    return forced


def verify(case: Case, backends: tuple[str, ...]) -> None:
    """Check every implementation of a case.

    Raises:
        CheckFailed: one is wrong.
    """
    for backend in backends:
        with psap_kernels.use_backend(backend):
            wrong = case.verify()
        if wrong:
            raise CheckFailed(f"{case.op} on {case.name}, backend {backend}: {wrong}")


def _run_case(
    name: str, case: Case, options: Options, device: torch.device, threads: int
) -> list[dict[str, Any]]:
    verify(case, options.backend)
    fused = {b: _with_backend(b, case.fused) for b in options.backend}
    variants: dict[str, Run] = {f"fused {b}": call for b, call in fused.items()}
    variants |= case.baselines
    limits = {} if case.limit is None else {case.limit[0]: case.limit[1]}
    both = {**variants, **limits}
    times = timing.measure(both, device, repeats=options.times(), threads=threads)
    limit = times.pop(case.limit[0]) if case.limit else None
    alone = _device_alone(case, fused, limits, device, options)
    written = []
    for backend in options.backend:
        own = times[f"fused {backend}"]
        row = {
            "op": case.op,
            "case": case.name,
            "shape": case.shape,
            "dtype": "float32" if case.dtype == "channels_last" else case.dtype,
            "layout": "channels_last" if case.dtype == "channels_last" else "contiguous",
            "device": str(device),
            "threads": threads,
            "clock": timing.clock(device, threads),
            "backend": serving(backend, case.op, device),
            "bytes": case.bytes,
            **asdict(own),
            "limit": case.limit and {"name": case.limit[0], **asdict(limit)},
            "percent_of_limit": limit and 100 * limit.median_ms / own.median_ms,
            "baselines": {
                other: {**asdict(times[other]), "ratio": times[other].median_ms / own.median_ms}
                for other in case.baselines
            },
            **alone.get(backend, {}),
        }
        written.append(rows.write(name, row, options.out))
    return written


def _device_alone(
    case: Case,
    fused: Mapping[str, Run],
    limits: Mapping[str, Run],
    device: torch.device,
    options: Options,
) -> dict[str, dict[str, float]]:
    """On a GPU: the kernel's own time, from replays of a CUDA graph, and its share of the limit."""
    if device.type != "cuda" or not case.capturable or not limits:
        return {}
    capturable = {b: run for b, run in fused.items() if serving(b, case.op, device) != "reference"}
    limit = next(iter(limits.values()))
    replays = {n: timing.graphed(run) for n, run in (*capturable.items(), ("limit", limit))}
    times = timing.measure(replays, device, repeats=options.times())
    limit_ms = times["limit"].median_ms / timing.REPLAYS
    return {
        backend: {
            "device_ms": times[backend].median_ms / timing.REPLAYS,
            "device_limit_ms": limit_ms,
            "device_percent_of_limit": 100 * limit_ms * timing.REPLAYS / times[backend].median_ms,
        }
        for backend in capturable
    }


def serving(backend: str, op: str, device: torch.device) -> str:
    """The implementation that "auto" stands for on a device."""
    if backend != "auto":
        return backend
    op = {"abs_quantile": "abs_histogram"}.get(op, op)  # three calls of it
    part = {"cpu": "_C", "cuda": "_C_cuda"}[device.type]
    if _load.part(part).module is not None and torch._C._dispatch_has_kernel_for_dispatch_key(
        f"psap::{op}", device.type.upper()
    ):
        return device.type
    if device.type == "cuda" and _load.triton_op(op) is not None:
        return "triton"
    return "reference"
