"""What happened while a network was pruned: plain records for state dicts and reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class PruneEvent:
    """One prune step.

    Attributes:
        step: t, from 1.
        call: the `Pruner.step()` call that pruned, from 1.
        iteration: optimizer steps taken before it.
        target_share: F_t, kept share of the bound resource that was asked for.
        macs_share: kept share of the MACs after the step.
        parameters_share: kept share of the parameters after the step.
        sparsity: weight sparsity ratio per group, as measured.
        sparsity_ema: the moving average that set the ratios.
        widths: channels kept per group.
        pruned: channels newly pruned per group (indices within the group).
        returned: channels of earlier steps that the ranking took back, per group.
        gave: share of the dense network's MACs that the group's new width alone saves, all other
            widths as they were before the step; negative where it grew.
    """

    step: int
    call: int
    iteration: int
    target_share: float
    macs_share: float
    parameters_share: float
    sparsity: dict[str, float]
    sparsity_ema: dict[str, float]
    widths: dict[str, int]
    pruned: dict[str, list[int]]
    returned: dict[str, list[int]]
    gave: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A pruned channel that supervision looked at when a window closed.

    Attributes:
        group: name of the group.
        channel: index within the group.
        value: mean of minus the gate derivative; positive if opening the gate lowers the loss.
        z: its significance, ``value`` over its standard error.
        restored: whether it came back.
        reason: why it did or did not.
    """

    group: str
    channel: int
    value: float
    z: float
    restored: bool
    reason: str


@dataclass(frozen=True, kw_only=True)
class WindowEvent:
    """One supervision window, after it closed.

    Attributes:
        step: t of the prune step that opened it.
        iteration: optimizer steps taken when it closed.
        observed: optimizer steps whose gradients were finite and counted.
        skipped: optimizer steps left out, because a gradient was not finite.
        supervised: freshly pruned channels that were watched, per group.
        candidates: the watched channels with a positive value, best first.
        prices: what one more unit of cost is worth per group, where something is pruned
            (protect="price").
        factors: on the kept width per group at the next prune step (protect="price").
    """

    step: int
    iteration: int
    observed: int
    skipped: int
    supervised: dict[str, int]
    candidates: tuple[Candidate, ...]
    prices: dict[str, float] = field(default_factory=dict)
    factors: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)


def event_to_json(event: PruneEvent | WindowEvent) -> dict[str, Any]:
    """An event as JSON values, with its kind."""
    kind = "prune" if isinstance(event, PruneEvent) else "window"
    return {"kind": kind, **event.to_json()}


def event_from_json(body: Mapping[str, Any]) -> PruneEvent | WindowEvent:
    """What `event_to_json` gave."""
    fields = {key: value for key, value in body.items() if key != "kind"}
    if body["kind"] == "prune":
        return PruneEvent(**fields)
    fields["candidates"] = tuple(Candidate(**c) for c in fields["candidates"])
    return WindowEvent(**fields)
