"""The state dict of a pruner, read with suspicion: all is checked before any of it is used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from psap import plans
from psap.config import Config
from psap.errors import PsapError, StateError
from psap.events import PruneEvent, WindowEvent, event_from_json
from psap.gates import Bools, Floats, Gates, Saved
from psap.graph import Side
from psap.protect import Window

COUNTERS = ("step", "calls", "iteration", "left", "final")


@dataclass(frozen=True)
class PrunerState:
    """A state that fits a pruner; the fields are those of `psap.Pruner`."""

    counters: Mapping[str, Any]
    alive: Bools
    fresh: Bools
    bonus: Floats
    window: Window
    sparsity: Floats | None
    saved: dict[Side, Saved]
    events: list[PruneEvent | WindowEvent]


def read_state(state: Any, config: Config, gates: Gates) -> PrunerState:
    """Check a state dict; nothing is changed.

    Args:
        state: what `psap.Pruner.state_dict` returned, perhaps through a file.
        config: the configuration of the pruner that shall take it.
        gates: its gates.

    Raises:
        StateError: the state belongs to another model or configuration, or is damaged.
    """
    if not isinstance(state, Mapping) or state.get("version") != 1:
        raise StateError("this is no state of a Pruner; pass what Pruner.state_dict() returned")
    if state.get("architecture") != plans.fingerprint(gates.graph.model):
        raise StateError("the state belongs to another model: names or shapes of parameters differ")
    try:
        _same_config(state["config"], asdict(config))
        return _read(state, config, gates)
    except PsapError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise StateError(
            f"the state is damaged ({type(error).__name__}: {error}); go back to an older one"
        ) from error


def _same_config(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    for key, value in mine.items():
        if theirs.get(key) != value:
            raise StateError(
                f"the state was made with another Config: {key} was {theirs.get(key)!r} and is "
                f"{value!r}; use the same Config"
            )


def _read(state: Mapping[str, Any], config: Config, gates: Gates) -> PrunerState:
    counters = _counters(state["counters"], config)
    groups = gates.graph.groups
    channels = len(gates.graph.group_of)
    alive = _array(state, "alive", np.zeros(channels, dtype=bool))
    for group in groups:
        if not alive[group.start : group.start + group.size].any():
            raise StateError(f"the state is damaged: it keeps no channel of {group.name}")
    window = Window(channels)
    window.load_state_dict(state["window"])
    none = state["sparsity"] is None
    return PrunerState(
        counters=counters,
        alive=alive,
        fresh=_array(state, "fresh", np.zeros(channels, dtype=bool)),
        bonus=_array(state, "bonus", np.zeros(channels)),
        window=window,
        sparsity=None if none else _array(state, "sparsity", np.zeros(len(groups))),
        saved=gates.read_state(state["saved"], alive, empty=counters["final"]),
        events=[event_from_json(event) for event in state["events"]],
    )


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
