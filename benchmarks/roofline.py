"""Measured bandwidths of the machine; bytes and launches of every way; times of an H100 on paper.

Bytes and launches of eager code are counted, not estimated: it runs on meta tensors, and a dispatch
mode adds up what every operator reads and writes. One operator that is not a view is one launch.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import limits, registry, rows, shapes, stats, tensors, timing

H100_BYTES_PER_S = 3.35e12
LAUNCH_US = 4.0
SIZES = {"in cache": 2**21, "in memory": 2**29}


class Traffic(TorchDispatchMode):
    """Counts launches, and bytes read and written, of what runs under it."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and add up its tensors."""
        out = func(*args, **(kwargs or {}))
        if not func.is_view and func.namespace == "aten" and "empty" not in str(func):
            self.launches += 1
            moved = tree_leaves((args, kwargs, out))
            self.bytes += sum(t.nbytes for t in moved if isinstance(t, Tensor))
        return out


def count(call: Callable[[], Any]) -> tuple[int, int]:
    """Launches and bytes of a call on meta tensors."""
    with Traffic() as traffic:
        call()
    return traffic.launches, traffic.bytes


def h100_us(launches: int, size: int) -> float:
    """A lower bound: launches follow each other, and memory cannot be faster."""
    return max(launches * LAUNCH_US, LAUNCH_US + size / H100_BYTES_PER_S * 1e6)


def gate(pairs: list[Tensor]) -> list[Tensor]:
    """Products of values and gradients, tensor by tensor, and the running sums."""
    d = torch.cat([(t.double() * t.double()) for t in pairs])
    d = torch.where(d.isfinite().all(), d, 0.0)
    return [d + d, d + d * d]


def on_paper(name: str) -> list[dict[str, Any]]:
    """Every way to the statistics and to the small tensors of a network."""
    network, meta = shapes.network(name), torch.device("meta")
    w, g = (tensors.like_weights(network, "float32", meta) for _ in range(2))
    keep = [[torch.empty((n + 1) // 2, dtype=torch.int64, device=meta) for n in s[:2]]
            for s in network.convs]  # fmt: skip
    small = 4 * sum(a.numel() * b.numel() * w[0].new_empty(s[2:]).numel()
                    for (a, b), s in zip(keep, network.convs, strict=True))  # fmt: skip
    filters = sum(s[0] for s in network.convs)
    channels = sum(network.norms)
    pairs = [torch.empty(n, device=meta) for n in network.norms for _ in range(2)]
    ways = {
        ("layer_stats", "naive"): count(lambda: stats.naive(w, g)),
        ("layer_stats", "tuned"): count(lambda: stats.tuned(w, g)),
        ("layer_stats", "foreach"): count(lambda: stats.foreach(w, g)),
        ("layer_stats", "fused"): (1, tensors.size(w, g) + 36 * filters),
        ("shrink", "index_select twice"): count(
            lambda: [
                t.index_select(0, a).index_select(1, b) for t, (a, b) in zip(w, keep, strict=True)
            ]
        ),
        ("shrink", "fused"): (1, 2 * small),
        ("gate_stats_", "naive"): count(lambda: gate(pairs)),
        # values and gradients; sums read and written; a term of 12 bytes for each of the pair
        ("gate_stats_", "fused"): (1, channels * (2 * 8 + 2 * 16 + 2 * 12 + 4)),
    }
    return [
        {"op": op, "case": name, "way": way, "launches": n, "bytes": size,
         "h100_us": h100_us(n, size)}
        for (op, way), (n, size) in ways.items()
    ]  # fmt: skip


def bandwidth(options: registry.Options, device: torch.device) -> list[dict[str, Any]]:
    """GB/s of reading and of copying, on one thread and on all."""
    found = []
    for label, size in SIZES.items():
        buffer = torch.ones(size // (16 if options.quick else 1) // 4, device=device)
        for threads in sorted({1, 1 if device.type == "cuda" else os.cpu_count() or 1}):
            read_name, read = limits.read([buffer], threads)
            copy_name, copy = limits.copy([buffer])
            ways = {f"read ({read_name})": read}
            if threads == 1:
                ways[f"copy ({copy_name})"] = copy
            timed = timing.measure(ways, device, repeats=options.times(), threads=threads)
            for way, times in timed.items():
                moved = buffer.nbytes * (2 if way.startswith("copy") else 1)
                found.append(
                    {"op": "bandwidth", "case": label, "way": way, "threads": threads,
                     "device": str(device), "bytes": moved, "time_ms": times.median_ms,
                     "gb_per_s": moved / times.median_ms / 1e6}
                )  # fmt: skip
    return found


def table(found: list[dict[str, Any]]) -> str:
    """The rows on paper as a Markdown table."""
    lines = ["| network | op | way | launches | GB moved | H100 at least, us |", "|---" * 6 + "|"]
    for row in found:
        lines.append(
            f"| {row['case']} | `{row['op']}` | {row['way']} | {row['launches']} |"
            f" {row['bytes'] / 1e9:.3g} | {row['h100_us']:.0f} |"
        )
    return "\n".join(lines)


def run(
    options: Annotated[registry.Options, tyro.conf.arg(name="")] = registry.Options(),  # noqa: B008
) -> list[dict[str, Any]]:
    """Measure bandwidths, do the arithmetic, write a row each and print the table."""
    device, before = registry.device_of(options), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        written = [rows.write("roofline", row, options.out) for row in bandwidth(options, device)]
    finally:
        torch.set_num_threads(before)
    paper = [row for name in options.names() for row in on_paper(name)]
    written += [rows.write("roofline", row, options.out) for row in paper]
    print(table(paper))
    return written
