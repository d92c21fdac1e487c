"""Pruning methods on one training loop and one cost model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks.methods import oneshot, peers, soft
from benchmarks.methods.ours import Psap
from benchmarks.methods.task import Method, Task

__all__ = ["METHODS", "Method", "Task"]

METHODS: dict[str, Callable[[], Method]] = {
    "dense": Method,
    "random": partial(oneshot.OneShot, oneshot.draw),
    "l1": partial(oneshot.OneShot, oneshot.l1),
    "l2-global": partial(oneshot.OneShot, oneshot.norms, oneshot.ranked),
    "fpgm": partial(oneshot.OneShot, oneshot.median),
    "taylor": partial(oneshot.OneShot, oneshot.taylor, oneshot.ranked),
    "slimming": oneshot.Slimming,
    "sfp": soft.SoftFilters,
    "asfp": partial(soft.SoftFilters, asymptotic=True),
    "tp-magnitude": partial(peers.TorchPruning, "magnitude"),
    "tp-magnitude-iterative": partial(peers.TorchPruning, "magnitude", times=5),
    "tp-group-norm": partial(peers.TorchPruning, "group-norm"),
    "psap": Psap,
    "psap-gate": partial(Psap, protect="gate"),
    "psap-pulse": partial(Psap, protect="pulse"),
    "psap-zero": partial(Psap, protect="none"),
    "psap-uniform": partial(Psap, adapt="uniform"),
    "psap-gate-uniform": partial(Psap, adapt="uniform", protect="gate"),
    "psap-streams": partial(Psap, stream_power=0.0, protect="gate"),
    "psap-spared": partial(Psap, stream_power=1.0, protect="gate"),
    "psap-quantile": partial(Psap, threshold="quantile"),
    "psap-multiples": partial(Psap, round_to=8),
    "psap-blocks": partial(Psap, blocks=100),
    "psap-blocks-multiples": partial(Psap, blocks=8, tolerance=2.0, round_to=8),
    "psap-window8": partial(Psap, window=8),
    "psap-steps10": partial(Psap, prune_steps=10),
    "psap-masked": partial(Psap, late=True),
    "psap-progressive": partial(Psap, progressive=True),
    "psap-fours": partial(Psap, round_to=4),
    "psap-fours-masked": partial(Psap, round_to=4, late=True),
    "psap-fours-progressive": partial(Psap, round_to=4, progressive=True),
    "psap-foreign": soft.AdaptiveFilters,
}
"""By name; "dense" prunes nothing. What the names mean is in docs/benchmarks.md."""
