"""Measured latency of layers by width: a table that is measured once and kept in a file.

Every convolution and linear layer of a traced model is timed alone, at a few shares of its filters
and inputs; between them times are interpolated. What a whole pass takes beside these layers (norms,
activations, pooling, Python) is measured once and scales with the activations.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_leaves

from psap import measure
from psap.calling import called
from psap.errors import ArgumentError, ArgumentTypeError, FileError
from psap.files import atomic_write, checked, require_writable
from psap.graph import Graph
from psap.graph.inputs import Inputs
from psap.layers import Layer, layers

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
FORMAT = "psap-latency"
VERSION = 1
SHARES = (0.125, 0.25, 0.5, 0.75, 1.0)
"""At which shares of its filters and of its inputs a layer is timed."""
SECONDS = 0.02
"""A point is timed again until this much time has passed, at least `PASSES` times."""
PASSES = 5


@dataclass(frozen=True)
class Curve:
    """Times of one layer.

    Attributes:
        knots: sizes of the first two dimensions of the weight at which it was timed, ascending.
        ms: milliseconds, [knots of dimension 0][knots of dimension 1].
    """

    knots: tuple[tuple[int, ...], tuple[int, ...]]
    ms: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class LatencyTable:
    """What `measure_latency` returns: times of layers on this machine.

    Attributes:
        machine: what they hold for: processor, torch, threads.
        curves: times by signature of the layer.
        rest_ms: the time beside the layers, by fingerprint of a model and shapes of its inputs.
    """

    machine: Mapping[str, Any]
    curves: Mapping[str, Curve]
    rest_ms: Mapping[str, float]

    def explain(self, graph: Graph) -> str:
        """The times of every layer of a model at full and at half width, as text."""
        lines = [f"{'layer':<40} {'weight':>16} {'ms':>9} {'at half of both':>16}"]
        total = 0.0
        for layer in self.require(graph):
            curve = self.curves[layer.signature()]
            shape = "x".join(map(str, layer.weight_shape))
            half = Times([0], [curve], 0.0).of(np.zeros(1, dtype=np.int64), _halves(layer))[0]
            lines.append(f"{layer.weight:<40} {shape:>16} {curve.ms[-1][-1]:>9.3f} {half:>16.3f}")
            total += curve.ms[-1][-1]
        rest = self.rest_ms[_key(graph)]
        lines.append(f"{'everything else':<40} {'':>16} {rest:>9.3f}")
        lines.append(f"{'together':<40} {'':>16} {total + rest:>9.3f}")
        return "\n".join(lines)

    def require(self, graph: Graph) -> list[Layer]:
        """Check that the table covers a model; returns the model's layers.

        Raises:
            ArgumentError: it does not.
        """
        found = layers(graph)
        missing = [x.weight for x in found if x.signature() not in self.curves]
        if missing or _key(graph) not in self.rest_ms:
            raise ArgumentError(
                f"the latency table does not know {missing[0] if missing else 'this model'}; "
                "measure it with psap.measure_latency(graph, path)"
            )
        return found

    def times(self, graph: Graph, row: Mapping[str, int]) -> Times:
        """Latency of a model as a function of the sizes of its weights.

        Args:
            graph: the model's graph.
            row: a number for every weight.

        Raises:
            ArgumentError: the table does not cover the model.
        """
        found = [layer for layer in self.require(graph) if layer.weight in row]
        curves = [self.curves[layer.signature()] for layer in found]
        return Times([row[layer.weight] for layer in found], curves, self.rest_ms[_key(graph)])


def _halves(layer: Layer) -> Floats:
    sizes = zip(layer.weight_shape[:2], layer.moves(), strict=True)
    return np.array([[size // 2 if moves else size] for size, moves in sizes], dtype=np.float64)


@called("psap.measure_latency(graph, path)")
def measure_latency(
    graph: Graph, path: str | os.PathLike[str] | None = None, *, threads: int = 1
) -> LatencyTable:
    """Time every layer of a model at several widths, on the device of the model.

    Takes seconds to a minute. What the file knows already is not timed again; what was timed is
    written to it even if the rest fails or is interrupted.

    Args:
        graph: what `psap.trace` returned; times hold for the batch it was traced with.
        path: the file of the table; made if there is none. None keeps the table in memory only.
        threads: CPU threads of one operator. With one, times are its CPU time.

    Raises:
        ArgumentTypeError: the graph is no graph.
        ArgumentError: ``threads`` is out of range.
        FileError: the file is damaged, was measured on another machine, or cannot be written.
    """
    if not isinstance(graph, Graph):
        raise ArgumentTypeError(
            f"graph is a {type(graph).__name__}; pass psap.trace(model, example_inputs)"
        )
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise ArgumentError(f"threads is {threads!r}; pass a whole number >= 1")
    device = next(graph.model.parameters()).device
    here = _machine(device, threads)
    known = LatencyTable(here, {}, {})
    if path is not None and checked(path).exists():
        known = read(path)
        if dict(known.machine) != here:
            raise FileError(
                f"{path} was measured with {_words(known.machine)}, this is {_words(here)}; times "
                "do not carry over: pass another path, or delete the file"
            )
    curves, rest = dict(known.curves), dict(known.rest_ms)
    before, found = torch.get_num_threads(), layers(graph)
    new = any(layer.signature() not in curves for layer in found) or _key(graph) not in rest
    if path is not None and new:
        require_writable(path)
    try:
        torch.set_num_threads(threads)
        for layer in found:
            if layer.signature() not in curves:
                curves[layer.signature()] = _curve(layer, device, threads)
        if _key(graph) not in rest:
            timed = [curves[layer.signature()] for layer in found]
            rest[_key(graph)] = _rest(graph, timed, device, threads)
    finally:
        torch.set_num_threads(before)
        table = LatencyTable(here, curves, rest)
        if path is not None and (curves != known.curves or rest != known.rest_ms):
            write(table, path)
    return table


def _key(graph: Graph) -> str:
    from psap.plans import fingerprint

    shapes = [list(x.shape) for x in tree_leaves(graph.inputs) if isinstance(x, Tensor)]
    return f"{fingerprint(graph.model)} {shapes}"


def _words(machine: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in machine.items())


def _machine(device: torch.device, threads: int) -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif info.exists():
        names = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        name = names[0].partition(":")[2].strip() if names else name
    return {"processor": name, "torch": torch.__version__, "threads": threads}


def _curve(layer: Layer, device: torch.device, threads: int) -> Curve:
    """Time a layer at every pair of knots; never faster where it is wider."""
    knots = layer.knots(SHARES)
    ms = np.array(
        [
            [_fastest(*layer.call((a, b), device), device, threads) for b in knots[1]]
            for a in knots[0]
        ]
    )
    ms = np.maximum.accumulate(np.maximum.accumulate(ms, axis=0), axis=1)
    return Curve(knots, tuple(tuple(row) for row in ms.tolist()))


def _fastest(call: Callable[..., Any], inputs: Inputs, device: torch.device, threads: int) -> float:
    """The fastest of several calls: the one that other load disturbed least."""
    once = measure.stopwatch(device, cpu_time=threads == 1)
    with torch.inference_mode():
        once(call, inputs, device)
        best, end, passes = math.inf, time.perf_counter() + SECONDS, 0
        while passes < PASSES or time.perf_counter() < end:
            best = min(best, once(call, inputs, device))
            passes += 1
    return best


def _rest(graph: Graph, curves: Sequence[Curve], device: torch.device, threads: int) -> float:
    with measure.quiet((graph.model,), threads):
        whole = _fastest(graph.model, graph.inputs, device, threads)
    return max(0.0, whole - sum(curve.ms[-1][-1] for curve in curves))


# From widths to times, for many layers at once


def _stacked(curves: Sequence[Curve]) -> tuple[Floats, Floats, Floats]:
    """Knots [curves, K] of both dimensions and times [curves, K, K]; short ones go on level."""
    size = max(2, max(len(k) for curve in curves for k in curve.knots))

    def level(knots: tuple[int, ...]) -> list[int]:
        return [*knots, *(knots[-1] + i + 1 for i in range(size - len(knots)))]

    first = np.array([level(curve.knots[0]) for curve in curves], dtype=np.float64)
    second = np.array([level(curve.knots[1]) for curve in curves], dtype=np.float64)
    ms = np.stack(
        [
            np.pad(
                np.array(c.ms), [(0, size - len(c.knots[0])), (0, size - len(c.knots[1]))], "edge"
            )
            for c in curves
        ]
    )
    return first, second, ms


def _position(knots: Floats, which: Ints, sizes: Floats) -> tuple[Ints, Floats]:
    """The knot below each size, and how far it is to the next one, from 0 to 1."""
    below = np.clip((knots[which] <= sizes[:, None]).sum(axis=1) - 1, 0, knots.shape[1] - 2)
    low, high = knots[which, below], knots[which, below + 1]
    return below, np.clip((sizes - low) / (high - low), 0, 1)


class Times:
    """Latency of a model for any sizes of its weights, for `psap.cost.CostModel`.

    Args:
        rows: number of the weight of every layer.
        curves: its times.
        rest_ms: what a pass of the dense network takes beside them.
    """

    def __init__(self, rows: Sequence[int], curves: Sequence[Curve], rest_ms: float) -> None:
        self.rows = np.array(rows, dtype=np.int64)
        self.rest_ms = rest_ms
        distinct = {curve: at for at, curve in enumerate(dict.fromkeys(curves))}
        self._curve = np.array([distinct[curve] for curve in curves], dtype=np.int64)
        self._first, self._second, self._ms = _stacked(list(distinct))

    def of(self, which: Ints, sizes: Floats) -> Floats:
        """Milliseconds of some layers, [n], at sizes [2 or more, n] of the weights' dimensions."""
        curve, ms = self._curve[which], self._ms
        i, s = _position(self._first, curve, sizes[0])
        j, t = _position(self._second, curve, sizes[1])
        low = ms[curve, i, j] * (1 - t) + ms[curve, i, j + 1] * t
        high = ms[curve, i + 1, j] * (1 - t) + ms[curve, i + 1, j + 1] * t
        result: Floats = low * (1 - s) + high * s
        return result


# The file


def write(table: LatencyTable, path: str | os.PathLike[str]) -> None:
    """Write a table as JSON, atomically.

    Raises:
        FileError: the file cannot be written; an older one survives.
    """
    body = {
        "format": FORMAT,
        "version": VERSION,
        "machine": dict(table.machine),
        "layers": {name: vars(curve) for name, curve in table.curves.items()},
        "rest_ms": dict(table.rest_ms),
    }
    atomic_write(path, json.dumps(body, indent=1))


def read(path: str | os.PathLike[str]) -> LatencyTable:
    """Read a table.

    Raises:
        FileError: there is no such file, it is no table, is damaged, or has another version.
    """
    try:
        body = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise FileError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is no latency table ({error}); delete it") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise FileError(f"{path} is no latency table; pass a file that psap.measure_latency wrote")
    if body.get("version") != VERSION:
        raise FileError(
            f"{path} has format version {str(body.get('version'))[:40]}, this psap reads "
            f"{VERSION}; upgrade psap, or delete the file"
        )
    try:
        machine = {key: body["machine"][key] for key in ("processor", "torch", "threads")}
        curves = {name: _curve_from(entry) for name, entry in body["layers"].items()}
        rest = {name: _time(value) for name, value in body["rest_ms"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FileError(
            f"{path} is damaged ({type(error).__name__}: {str(error)[:80]}); delete it, and "
            "measure again"
        ) from error
    return LatencyTable(machine, curves, rest)


def _curve_from(entry: Mapping[str, Any]) -> Curve:
    first, second = (tuple(knots) for knots in entry["knots"])
    for knots in (first, second):
        if not knots or any(type(k) is not int or k < 1 for k in knots):
            raise ValueError("sizes must be whole numbers >= 1")
        if any(a >= b for a, b in pairwise(knots)):
            raise ValueError("sizes must rise")
    ms = tuple(tuple(_time(t) for t in row) for row in entry["ms"])
    if [len(row) for row in ms] != [len(second)] * len(first):
        raise ValueError("there must be one time for every size")
    return Curve((first, second), ms)


def _time(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{value!r} is no time")
    if not 0 <= value < 1e9:
        raise ValueError(f"{value!r} is no time in milliseconds")
    return float(value)
