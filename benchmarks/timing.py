"""Times of several ways to do one thing, interleaved in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Run = Callable[[], Any]


@dataclass(frozen=True)
class Times:
    """Milliseconds of one variant."""

    median_ms: float
    p20_ms: float
    p80_ms: float

    @classmethod
    def of(cls, values_ms: list[float]) -> Times:
        """Summarise single times."""
        fifths = statistics.quantiles(values_ms, n=5, method="inclusive")
        return cls(statistics.median(values_ms), fifths[0], fifths[3])


def clock(device: torch.device, threads: int) -> str:
    """What is read: other load does not count in CPU time, but CPU time adds threads up."""
    if device.type == "cuda":
        return "cuda events"
    return "process_time" if threads == 1 else "perf_counter"


def measure(
    variants: Mapping[str, Run],
    device: torch.device,
    *,
    repeats: int,
    threads: int = 1,
    warmup: int = 2,
) -> dict[str, Times]:
    """Run the variants in turn, so that other load meets all alike; the first turns count not."""
    once = _on_cuda if device.type == "cuda" else _on_cpu(threads)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(-warmup, repeats):
        for name, run in variants.items():
            elapsed_ms = once(run)
            if turn >= 0:
                times[name].append(elapsed_ms)
    return {name: Times.of(values) for name, values in times.items()}


SHORTEST_S = 2e-3  # of one reading: a short call is repeated until then


def _on_cpu(threads: int) -> Callable[[Run], float]:
    """Repeated calls: what fits a cache is in it, whatever another variant left there."""
    read = time.process_time if threads == 1 else time.perf_counter

    def once(run: Run) -> float:
        run()
        calls, start, end = 0, read(), time.perf_counter() + SHORTEST_S
        while calls == 0 or time.perf_counter() < end:
            run()
            calls += 1
        return (read() - start) / calls * 1e3

    return once


def _on_cuda(run: Run) -> float:
    """From an idle device to the end of the work: what a caller waits for, host included."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


REPLAYS = 20


def graphed(run: Run) -> Run:
    """Capture a call in a CUDA graph and replay it `REPLAYS` times: the device alone, no host."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay() -> None:
        for _ in range(REPLAYS):
            graph.replay()

    return replay
