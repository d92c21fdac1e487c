"""Multiples of channels that are really faster: small networks, timed in turn.

Fewer MACs are not always faster: kernels work on blocks of channels, and a width that leaves a
block half empty pays for all of it. Which multiple suits a machine is measured on the whole small
network, not guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from psap import measure
from psap.errors import ArgumentError, TargetError
from psap.graph import Graph
from psap.graph.inputs import forward
from psap.plans import Plan, plan
from psap.shrink import apply

CANDIDATES = (1, 2, 4, 8, 16, 32)
NEAR = 1.03
"""Times within this factor of the best count as equal: the finest multiple of them is taken."""


@dataclass(frozen=True)
class Rounding:
    """What was measured.

    Attributes:
        round_to: the multiple that was taken.
        plan: its plan.
        times: times of the small network of every multiple; equal plans are timed once.
    """

    round_to: int
    plan: Plan
    times: Mapping[int, measure.Latency]

    def explain(self) -> str:
        """A text with the time of every multiple, and which was taken."""
        lines = ["small networks, timed in turn:"]
        for multiple, time in self.times.items():
            taken = "  <- --round-to " + str(multiple) if multiple == self.round_to else ""
            lines.append(
                f"  widths of multiples of {multiple:>2}: {time.median_ms:.3f} ms "
                f"({time.p20_ms:.3f} to {time.p80_ms:.3f}){taken}"
            )
        return "\n".join([*lines, self.plan.explain().splitlines()[0]])


def fastest(
    graph: Graph,
    *,
    candidates: Sequence[int] = CANDIDATES,
    repeats: int = 30,
    threads: int | None = None,
    **options: Any,
) -> Rounding:
    """Make the small network for several multiples, time them in turn, and take the fastest.

    Args:
        graph: what `psap.trace` returned.
        candidates: multiples, as for ``round_to``.
        repeats: passes that are timed, of each.
        threads: CPU threads of one operator; None keeps the present number. With one, times are its
            CPU time, as those of `psap.measure_latency` are.
        options: those of `psap.plan`.

    Raises:
        ArgumentError: there is no candidate, or the small network fails on the inputs.
        TargetError: the target cannot be met with the finest of them.
    """
    if not candidates:
        raise ArgumentError("candidates is empty; pass multiples such as (1, 8, 16)")
    plans: dict[int, Plan] = {}
    for multiple in sorted(set(candidates)):
        try:
            made = plan(graph, round_to=multiple, **options)
        except TargetError:
            if not plans:  # not even the finest multiple meets the target
                raise
            break  # too coarse to meet it, and so are the next
        if all(made != other for other in plans.values()):
            plans[multiple] = made
    models = [_small(graph, made) for made in plans.values()]
    cpu_time = (threads or torch.get_num_threads()) == 1  # as the tables of `psap.latency`
    found = measure.latencies(
        tuple(models), graph.inputs, repeats=repeats, warmup=5, threads=threads, cpu_time=cpu_time
    )
    times = dict(zip(plans, found, strict=True))
    best = min(t.median_ms for t in times.values())
    taken = next(multiple for multiple, t in times.items() if t.median_ms <= NEAR * best)
    return Rounding(taken, plans[taken], times)


def _small(graph: Graph, made: Plan) -> nn.Module:
    """The small network, for timing: as it is if that runs, else in graph mode."""
    if not made.counted:
        small = apply(graph.model, made, check=False, mode="module").model
        try:
            with torch.no_grad():
                forward(small.eval(), graph.inputs)
            return small
        except Exception:  # sizes that forward() fixes
            pass
    return apply(graph.model, made, check=False, mode="graph").model
