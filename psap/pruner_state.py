"""What a pruner says, writes and reads: warnings, events, and a state that is not trusted.

All of a state is checked before any of it is used.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from psap import optim, schedule
from psap.config import Config, Target
from psap.errors import ArgumentError, ArgumentTypeError, PsapError, PsapWarning, StateError
from psap.events import PruneEvent, WindowEvent, event_from_json, event_to_json
from psap.gates import Bools, Floats, Gates, Saved
from psap.graph import Graph, Group, Side
from psap.hooktime import HookTime
from psap.lineage import Lineage
from psap.protect import Verdict, Window
from psap.ranks import Ranks
from psap.scores import GroupStats

Ints = schedule.Ints
COUNTERS = ("step", "calls", "iteration", "left", "final")
ARRAYS = ("alive", "fresh", "bonus", "factors")
COPIED = (
    "a Pruner can be neither copied nor pickled: it works on one model and one optimizer. Save "
    "pruner.state_dict(), and load it into a new Pruner of the copied model"
)
FINISHED = {
    "step": "step() after finish(); train result.model on without the pruner",
    "finish": "finish() was already called; use the result that it returned",
    "load_state_dict": "load_state_dict() after finish(); make a new Pruner for it",
}
"""What a call says after `psap.Pruner.finish`."""


@dataclass(frozen=True)
class PrunerState:
    """A state that fits a pruner; the fields are those of `psap.Pruner`."""

    counters: Mapping[str, Any]
    alive: Bools
    fresh: Bools
    bonus: Floats
    window: Window
    factors: Floats
    gone: list[GroupStats]
    sparsity: Floats | None
    saved: dict[Side, Saved]
    events: list[PruneEvent | WindowEvent]


def by_group(lineage: Lineage, channels: Bools) -> dict[str, list[int]]:
    """The channels that are set, as dense indices within their group, by the group's name."""
    pairs = zip(lineage.graph.groups, lineage.kept(channels), strict=True)
    return {group.name: found.tolist() for group, found in pairs if found.size}


@dataclass(frozen=True)
class Pruned:
    """One prune step, as arrays: floats [groups], bools [channels]."""

    target: Target
    sparsity: Floats
    mean: Floats
    alive: Bools
    pruned: Bools
    returned: Bools


def prune_event(lineage: Lineage, done: Pruned, **when: int) -> PruneEvent:
    """The record of one prune step.

    Args:
        lineage: the channel graph, and what its channels are called.
        done: what the step did.
        when: step, call and iteration.
    """
    graph, cost = lineage.graph, lineage.cost
    widths: Ints = np.bincount(graph.group_of[done.alive], minlength=len(graph.groups))
    after, dense = cost.cost(widths), cost.dense
    before = (done.alive | done.pruned) & ~done.returned
    was: Ints = np.bincount(graph.group_of[before], minlength=len(graph.groups))
    gave = -cost.changes(was, widths)[0] / max(1, dense.macs)
    names = [g.name for g in graph.groups]
    target = done.target
    share = next(bound for bound in asdict(target).values() if bound is not None)
    return PruneEvent(
        **when,
        target_share=float(share),
        macs_share=after.macs / max(1, dense.macs),
        parameters_share=after.parameters / max(1, dense.parameters),
        sparsity=dict(zip(names, done.sparsity.tolist(), strict=True)),
        sparsity_ema=dict(zip(names, done.mean.tolist(), strict=True)),
        widths=dict(zip(names, widths.tolist(), strict=True)),
        pruned=by_group(lineage, done.pruned),
        returned=by_group(lineage, done.returned),
        gave=dict(zip(names, gave.tolist(), strict=True)),
    )


def window_event(
    lineage: Lineage,
    window: Window,
    verdict: Verdict,
    fresh: Bools,
    priced: tuple[Floats, Floats] | None = None,
    **when: int,
) -> WindowEvent:
    """The record of one window.

    Args:
        lineage: the channel graph, and what its channels are called.
        window: the window.
        verdict: what it found.
        fresh: bool [channels], what it supervised.
        priced: prices and factors, float64 [groups] each.
        when: step and iteration.
    """
    names = [g.name for g in lineage.graph.groups]
    price, factor = (
        ({}, {}) if priced is None else (dict(zip(names, x, strict=True)) for x in priced)
    )
    return WindowEvent(
        **when,
        observed=window.observed,
        skipped=window.skipped,
        supervised={name: len(found) for name, found in by_group(lineage, fresh).items()},
        candidates=verdict.candidates,
        prices={name: float(p) for name, p in price.items() if np.isfinite(p)},
        factors={name: float(f) for name, f in factor.items()},
    )


def run_report(
    events: Sequence[PruneEvent | WindowEvent], config: Config, times: HookTime
) -> dict[str, Any]:
    """What ``Result.report`` says of a run, beside the verification."""
    return {
        "events": [event_to_json(event) for event in events],
        "config": asdict(config),
        "time": times.to_json(),
    }


def target_at(step: int, config: Config) -> Target:
    """What a prune step reaches on the way to the target."""

    def share(bound: float | None) -> float | None:
        if bound is None:
            return None
        return schedule.kept_share(step, config.prune_steps, bound, config.schedule)

    return Target(**{name: share(bound) for name, bound in asdict(config.target).items()})


def require_progressive(ranks: Ranks, keep_optimizer: bool) -> None:
    """Check that a network may change its shapes while it trains.

    Raises:
        ArgumentError: something holds on to the dense shapes.
    """
    ranks.refuse_inplace("Config(progressive=True)")
    if not keep_optimizer:
        raise ArgumentError(
            "Config(progressive=True) cuts the optimizer's state while it trains; use an optimizer "
            "whose state can be cut (SGD, AdamW), with keep_optimizer=True"
        )


def require_inplace(ranks: Ranks, keep_optimizer: bool) -> None:
    """Check that `psap.Pruner.finish` may change the caller's objects.

    Raises:
        ArgumentError: some of them would not fit afterwards.
    """
    ranks.refuse_inplace("finish(inplace=True)")
    if not keep_optimizer:
        raise ArgumentError(
            "finish(inplace=True) with keep_optimizer=False would leave the optimizer with state "
            "of the wrong shapes; call finish(keep_optimizer=False), and make a new optimizer for "
            "result.model"
        )


class Pace:
    """Looks at how much is trained between prune steps.

    Args:
        trained: optimizer steps at the last call of `psap.Pruner.step`; None if it is not known: a
            state may be taken between the training of an epoch and its step.
    """

    HASTY = 3  # calls in a row with one optimizer step each: no epoch is that short

    def __init__(self, trained: int | None = 0) -> None:
        self._trained, self._hasty = trained, 0

    def called(self, iteration: int) -> None:
        """Warn the caller of `psap.Pruner.step` if it is called too often."""
        made = None if self._trained is None else iteration - self._trained
        self._trained, self._hasty = iteration, self._hasty + 1 if made == 1 else 0
        if made == 0:
            warnings.warn(
                "step() was called, but the optimizer made no step since the last call; train "
                "between the calls, and pass to Pruner the optimizer that trains the model",
                PsapWarning,
                stacklevel=3,
            )
        if self._hasty == self.HASTY:
            warnings.warn(
                f"step() was called {self.HASTY} times with one optimizer step between the calls; "
                "call it once per epoch, not once per batch: the network must recover between two "
                "prune steps",
                PsapWarning,
                stacklevel=3,
            )


def configured(config: Any) -> Config:
    """The configuration that was given, or the default one.

    Raises:
        ArgumentTypeError: it is none.
    """
    if config is not None and not isinstance(config, Config):
        raise ArgumentTypeError(
            f"config is a {type(config).__name__}; pass psap.Config(target=psap.Target(macs=0.3))"
        )
    return config or Config()


def check_training(optimizer: torch.optim.Optimizer, friends: Sequence[Any], graph: Graph) -> None:
    """Check what shall train a pruner's model; warn if layers are pruned that nothing trains.

    Raises:
        ArgumentTypeError: the optimizer is none.
        ArgumentError: it trains another model.
        StateError: another pruner works on it.
    """
    optim.check_optimizer(optimizer, graph.model)
    optim.require_alone(optimizer)
    others = [friend for friend in friends if isinstance(friend, torch.optim.Optimizer)]
    trained = {
        id(p) for each in (optimizer, *others) for g in each.param_groups for p in g["params"]
    }
    weights = dict(graph.model.named_parameters())
    makers = dict.fromkeys(name for group in graph.groups for name in group.producers)
    left = [name for name in makers if name in weights and id(weights[name]) not in trained]
    if left:
        warnings.warn(
            f"the optimizer trains none of {len(left)} of the {len(makers)} weights that make "
            f"prunable channels, {left[0]} for one: they are pruned, but cannot recover. Make the "
            "optimizer from model.parameters(); or pass the other optimizer to "
            "Pruner(friends=[...]); or freeze what shall stay with requires_grad_(False)",
            PsapWarning,
            stacklevel=5,
        )


def progress(graph: Graph, step: int, steps: int, events: Sequence[Any]) -> str:
    """How far a pruner is, for people who print it."""
    shares = [event.macs_share for event in events if isinstance(event, PruneEvent)]
    return (
        f"Pruner({type(graph.model).__name__}: {len(graph.groups)} groups, prune step {step} of "
        f"{steps}, MACs {100 * [1.0, *shares][-1]:.1f} % kept)"
    )


def warn_due(due: int, steps: int) -> None:
    """Warn the caller of `psap.Pruner.finish` of prune steps that were still due."""
    warnings.warn(
        f"finish() makes up for {due} of {steps} prune steps at once, which costs accuracy; train "
        "for more epochs, with step() after each, or lower Config.prune_steps (warmup, interval)",
        PsapWarning,
        stacklevel=3,
    )


def read_state(
    state: Any, config: Config, lineage: Lineage, optimizer: torch.optim.Optimizer
) -> tuple[Bools, PrunerState]:
    """Check a state dict; nothing is changed.

    Args:
        state: what `psap.Pruner.state_dict` returned, perhaps through a file.
        config: the configuration of the pruner that shall take it.
        lineage: what is left of its model.
        optimizer: its optimizer.

    Returns:
        bool [channels], what the model must be cut to, and the state.

    Raises:
        StateError: the state belongs to another model or configuration, or is damaged.
    """
    if not isinstance(state, Mapping) or state.get("version") != 1:
        raise StateError("this is no state of a Pruner; pass what Pruner.state_dict() returned")
    if state.get("architecture") != lineage.architecture:
        raise StateError("the state belongs to another model: names or shapes of parameters differ")
    try:
        _same_config(state["config"], asdict(config))
        groups = lineage.graph.groups
        rest = np.ones(sum(group.size for group in groups), dtype=bool)
        if config.progressive:
            rest = lineage.read_state(state["kept"])
        graph = lineage.graph if rest.all() else lineage.preview(rest)
        return rest, _read(state, config, Gates(graph, optimizer, config.closed))
    except PsapError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise StateError(
            f"the state is damaged ({type(error).__name__}: {error}); go back to an older one"
        ) from error


def _same_config(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    for key, value in mine.items():
        if _given(theirs.get(key)) != _given(value):
            raise StateError(
                f"the state was made with another Config: {key} was {theirs.get(key)!r} and is "
                f"{value!r}; use the same Config"
            )


def _given(value: Any) -> Any:
    """A setting without what is None: states may be older than a bound of a target."""
    if isinstance(value, Mapping):
        return {key: item for key, item in value.items() if item is not None}
    return value


def _read(state: Mapping[str, Any], config: Config, gates: Gates) -> PrunerState:
    counters = _counters(state["counters"], config)
    groups = gates.graph.groups
    channels = len(gates.graph.group_of)
    alive = _array(state, "alive", np.zeros(channels, dtype=bool))
    for group in groups:
        if not alive[group.start : group.start + group.size].any():
            raise StateError(f"the state is damaged: it keeps no channel of {group.name}")
    window = Window(channels, gates.device)
    window.load_state_dict(state["window"])
    none, gone = state["sparsity"] is None, state["gone"] if config.progressive else None
    return PrunerState(
        counters=counters,
        alive=alive,
        fresh=_array(state, "fresh", np.zeros(channels, dtype=bool)),
        bonus=_array(state, "bonus", np.zeros(channels)),
        window=window,
        factors=_array(state, "factors", np.ones(len(groups))),
        gone=[_gone(gone and gone[i], group) for i, group in enumerate(groups)],
        sparsity=None if none else _array(state, "sparsity", np.zeros(len(groups))),
        saved=gates.read_state(state["saved"], alive, empty=counters["final"]),
        events=[event_from_json(event) for event in state["events"]],
    )


def _gone(state: Mapping[str, Any] | None, group: Group) -> GroupStats:
    none = np.zeros((len(group.producers), group.size))
    if state is None:
        return GroupStats(none, 0, 0)
    sparse, elements = state["sparse"], state["elements"]
    if type(sparse) is not int or type(elements) is not int:
        raise StateError(f"the state is damaged: it counts {sparse!r} of {elements!r} weights")
    return GroupStats(_array(state, "power", none), sparse, elements)


def _counters(counters: Mapping[str, Any], config: Config) -> dict[str, Any]:
    found = {name: counters[name] for name in COUNTERS}
    limits = {"step": config.prune_steps, "left": config.window}
    for name, value in found.items():
        kind = bool if name == "final" else int
        if type(value) is not kind or not 0 <= value <= limits.get(name, value):
            raise StateError(f"the state is damaged: its counter {name!r} is {value!r}")
    return found


def _array(state: Mapping[str, Any], key: str, like: np.ndarray[Any, Any]) -> Any:
    array = torch.as_tensor(state[key]).detach().cpu().numpy().copy()
    if array.shape != like.shape or array.dtype != like.dtype or not np.isfinite(array).all():
        raise StateError(
            f"the state is damaged: {key!r} is {array.dtype} of shape {array.shape}, finite "
            f"{like.dtype} of shape {like.shape} is wanted"
        )
    return array
