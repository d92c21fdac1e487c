"""Measured costs: latency, parameters, file size."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from psap.errors import ArgumentError, FileError
from psap.graph.inputs import Inputs, forward
from psap.untouched import unchanged

Once = Callable[[Callable[..., Any], Inputs, torch.device], float]


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Times of one forward pass, in milliseconds.

    Attributes:
        median_ms: the middle one.
        p20_ms: one in five passes was faster.
        p80_ms: one in five passes was slower.
        repeats: passes that were timed.
        threads: CPU threads of one operator.
        device: "cpu", "cuda:0", ...
    """

    median_ms: float
    p20_ms: float
    p80_ms: float
    repeats: int
    threads: int
    device: str


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two models, timed in turn.

    Attributes:
        a: the first.
        b: the second.
    """

    a: Latency
    b: Latency

    @property
    def ratio(self) -> float:
        """Median of a over median of b: 2.0 means that b takes half the time."""
        return self.a.median_ms / self.b.median_ms


def latency_ms(
    model: nn.Module,
    example_inputs: Tensor | Inputs,
    *,
    repeats: int = 50,
    warmup: int = 10,
    threads: int | None = None,
) -> Latency:
    """Time the forward pass in eval mode, without gradients.

    Args:
        model: on a CPU or on a CUDA device; its train flags are left as they were.
        example_inputs: a tensor, a tuple of positional inputs, or a dict of inputs by keyword, on
            the same device.
        repeats: passes that are timed.
        warmup: passes before them.
        threads: CPU threads of one operator while timing; None keeps the present number.

    Raises:
        ArgumentError: an option is out of range, or the device is neither CPU nor CUDA.
    """
    (times,) = latencies((model,), example_inputs, repeats=repeats, warmup=warmup, threads=threads)
    return times


def compare_latency(
    a: nn.Module,
    b: nn.Module,
    example_inputs: Tensor | Inputs,
    *,
    repeats: int = 50,
    warmup: int = 10,
    threads: int | None = None,
) -> Comparison:
    """Time two models in turn (a, b, a, b, ...), so that other load meets both alike.

    Arguments and errors are those of `latency_ms`; both models are on one device.

    Raises:
        ArgumentError: an option is out of range, or the device is neither CPU nor CUDA.
    """
    first, second = latencies(
        (a, b), example_inputs, repeats=repeats, warmup=warmup, threads=threads
    )
    return Comparison(a=first, b=second)


def parameters(model: nn.Module) -> int:
    """Number of parameter values; a tensor that is used twice counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def file_size(path: str | Path) -> int:
    """Size of a file in bytes.

    Raises:
        FileError: there is no such file.
    """
    try:
        return Path(path).stat().st_size
    except OSError as error:
        raise FileError(f"{path} cannot be read ({error.strerror})") from error


def latencies(
    models: tuple[nn.Module, ...],
    example_inputs: Tensor | Inputs,
    *,
    repeats: int,
    warmup: int,
    threads: int | None,
    cpu_time: bool = False,
) -> list[Latency]:
    """Time several models in turn, by the clock of `stopwatch`; the rest is as for `latency_ms`.

    Raises:
        ArgumentError: an option is out of range, or the device is neither CPU nor CUDA.
    """
    for name, value, low in (("repeats", repeats, 1), ("warmup", warmup, 0)):
        if value < low:
            raise ArgumentError(f"{name} is {value}; pass a whole number >= {low}")
    if threads is not None and threads < 1:
        raise ArgumentError(f"threads is {threads}; pass a whole number >= 1, or None")
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
    device = _device(models, inputs)
    once = stopwatch(device, cpu_time=cpu_time)
    times = np.empty((len(models), repeats))
    with quiet(models, threads):
        for index in range(-warmup, repeats):
            for row, model in enumerate(models):
                elapsed_ms = once(model, inputs, device)
                if index >= 0:
                    times[row, index] = elapsed_ms
        used = torch.get_num_threads()
    p20, median, p80 = np.percentile(times, (20, 50, 80), axis=1)
    return [
        Latency(
            median_ms=float(median[row]),
            p20_ms=float(p20[row]),
            p80_ms=float(p80[row]),
            repeats=repeats,
            threads=used,
            device=str(device),
        )
        for row in range(len(models))
    ]


def _device(models: tuple[nn.Module, ...], inputs: Inputs) -> torch.device:
    tensors = [item for item in tree_leaves(inputs) if isinstance(item, Tensor)]
    for model in models:
        tensors += [*model.parameters(), *model.buffers()]
    devices = {tensor.device for tensor in tensors}
    if len(devices) != 1 or next(iter(devices)).type not in ("cpu", "cuda"):
        names = ", ".join(sorted(map(str, devices))) or "no device"
        raise ArgumentError(
            f"model and inputs are on {names}; move all of them to the CPU or to one CUDA device"
        )
    return devices.pop()


@contextmanager
def quiet(models: tuple[nn.Module, ...], threads: int | None) -> Iterator[None]:
    """Eval mode, no gradients, this many threads; then everything as it was."""
    before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        with ExitStack() as stack:
            for model in models:
                stack.enter_context(unchanged(model))
                model.eval()
            stack.enter_context(torch.inference_mode())
            yield
    finally:
        if threads is not None:
            torch.set_num_threads(before)


def stopwatch(device: torch.device, *, cpu_time: bool = False) -> Once:
    """What times one call on a device, in milliseconds: of a callable, its inputs, the device.

    Args:
        device: a CPU or a CUDA device.
        cpu_time: on a CPU, the time that this process computes, in which other load hardly shows,
            instead of the time that a caller waits; of use for one thread.
    """
    if device.type == "cuda":
        return _once_cuda
    clock = time.process_time_ns if cpu_time else time.perf_counter_ns

    def once(model: Callable[..., Any], inputs: Inputs, _: torch.device) -> float:
        start = clock()
        forward(model, inputs)
        return (clock() - start) / 1e6

    return once


def _once_cuda(model: Callable[..., Any], inputs: Inputs, device: torch.device) -> float:
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        forward(model, inputs)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))
