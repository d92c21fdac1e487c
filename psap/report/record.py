"""Reads a report record into typed, immutable values; says which key is broken.

Structure is strict (a list where a list belongs, names that are strings), numbers are lenient:
whatever is missing, not a number or not finite becomes None, which the page shows as a dash.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from psap.errors import ArgumentError

FORMAT = "psap-report"
VERSION = 1
MAX_CHANNELS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Group:
    """Channels that are pruned together. ``reason``: why not; ``part``: which of the layer's."""

    name: str
    size: int
    kept: frozenset[int]
    reason: str | None
    layers: tuple[str, ...]
    part: str = ""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer before and after; widths are (out, in)."""

    name: str
    kind: str
    before: tuple[int | None, int | None]
    after: tuple[int | None, int | None]
    macs_before: float | None
    macs_after: float | None
    parameters_before: float | None
    parameters_after: float | None


@dataclass(frozen=True, kw_only=True)
class Step:
    """One prune step (`psap.events.PruneEvent`)."""

    step: int
    call: int | None
    macs_share: float | None
    sparsity: dict[str, float | None]
    sparsity_ema: dict[str, float | None]
    widths: dict[str, float | None]
    pruned: dict[str, frozenset[int]]
    returned: dict[str, frozenset[int]]
    gave: dict[str, float | None]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One supervised channel (`psap.events.Candidate`) and the step whose window watched it."""

    step: int
    group: str
    channel: int
    value: float | None
    z: float | None
    restored: bool
    reason: str


@dataclass(frozen=True, kw_only=True)
class Window:
    """One supervision window (`psap.events.WindowEvent`)."""

    step: int
    supervised: dict[str, float | None]
    candidates: tuple[Candidate, ...]
    prices: dict[str, float | None]
    factors: dict[str, float | None]


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One epoch of training."""

    epoch: float
    phase: str
    loss: float | None
    accuracy: float | None
    macs_share: float | None
    lr: float | None
    seconds: float | None


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Milliseconds per batch."""

    median: float | None
    p20: float | None
    p80: float | None


@dataclass(frozen=True, kw_only=True)
class Side:
    """What was measured of one network."""

    accuracy: float | None = None
    macs: float | None = None
    parameters: float | None = None
    file_bytes: float | None = None
    latency: Latency | None = None
    onnx_latency: Latency | None = None


@dataclass(frozen=True, kw_only=True)
class Record:
    """Everything that the page shows."""

    title: str
    created: str
    command: str
    seed: int | None
    environment: dict[str, Any]
    config: dict[str, Any]
    groups: tuple[Group, ...]
    layers: tuple[Layer, ...]
    left_alone: tuple[tuple[str, str], ...]
    steps: tuple[Step, ...]
    windows: tuple[Window, ...]
    history: tuple[Epoch, ...]
    dense: Side
    small: Side
    began_accuracy: float | None
    batch: int | None
    threads: int | None
    verification: dict[str, Any]
    onnx_difference: float | None
    time: dict[str, float | None]


def number(value: object) -> float | None:
    """The value as a finite float, or None; what no run can measure (1e100) is None as well."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        result = float(value)
    except OverflowError:
        return None
    return result if math.isfinite(result) and abs(result) < 1e100 else None


def whole(value: object) -> int | None:
    """The value as an int, or None if it is not an integer."""
    result = number(value)
    return None if result is None or result != int(result) else int(result)


def _broken(where: str, found: object, wanted: str) -> ArgumentError:
    shown = f"{type(found).__name__} {found!r}"
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return ArgumentError(f"broken report record: {where} is {shown}, wanted {wanted}")


def _mapping(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _broken(where, value, "an object")
    return value


def _list(value: object, where: str) -> Sequence[Any]:
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise _broken(where, value, "a list")
    return value


def _string(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise _broken(where, value, "a string")
    return value


def _integer(value: object, where: str, low: int = 0) -> int:
    result = whole(value)
    if result is None or result < low:
        raise _broken(where, value, f"an integer >= {low}")
    return result


def _need(entry: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in entry:
        raise ArgumentError(f"broken report record: {where} lacks the key {key!r}")
    return entry[key]


def _optional(record: Mapping[str, Any], key: str, empty: Any) -> Any:
    value = record.get(key)
    return empty if value is None else value


def _entries(record: Mapping[str, Any], key: str) -> list[tuple[str, Mapping[str, Any]]]:
    found = []
    for i, entry in enumerate(_list(_optional(record, key, ()), key)):
        found.append((f"{key}[{i}]", _mapping(entry, f"{key}[{i}]")))
    return found


def _indices(value: object, where: str, size: int | None = None) -> frozenset[int]:
    found = frozenset(_integer(i, f"an index in {where}") for i in _list(value, where))
    if size is not None and found and max(found) >= size:
        raise _broken(f"an index in {where}", max(found), f"an integer < {size}")
    return found


def _per_group(entry: Mapping[str, Any], key: str, where: str) -> dict[str, float | None]:
    values = _mapping(_optional(entry, key, {}), f"{where}.{key}")
    return {str(name): number(value) for name, value in values.items()}


def _per_group_indices(entry: Mapping[str, Any], key: str, where: str) -> dict[str, frozenset[int]]:
    values = _mapping(_optional(entry, key, {}), f"{where}.{key}")
    return {str(name): _indices(value, f"{where}.{key}") for name, value in values.items()}


def _groups(record: Mapping[str, Any]) -> tuple[Group, ...]:
    _need(record, "groups", "it")
    found: list[Group] = []
    for where, entry in _entries(record, "groups"):
        size = _integer(_need(entry, "size", where), f"{where}.size")
        if size > MAX_CHANNELS:
            raise _broken(f"{where}.size", size, f"at most {MAX_CHANNELS} channels")
        reason = entry.get("reason")
        layers = _list(_optional(entry, "layers", ()), f"{where}.layers")
        found.append(
            Group(
                name=_string(_need(entry, "name", where), f"{where}.name"),
                size=size,
                kept=_indices(_need(entry, "kept", where), f"{where}.kept", size),
                reason=None if reason is None else _string(reason, f"{where}.reason"),
                layers=tuple(_string(name, f"{where}.layers") for name in layers),
                part=_string(_optional(entry, "part", ""), f"{where}.part"),
            )
        )
    return tuple(found)


def _width(entry: Mapping[str, Any], key: str, where: str) -> tuple[int | None, int | None]:
    pair = _list(_need(entry, key, where), f"{where}.{key}")
    if len(pair) != 2:
        raise _broken(f"{where}.{key}", list(pair), "[out, in]")
    out, into = whole(pair[0]), whole(pair[1])
    if min(out or 0, into or 0) < 0:
        raise _broken(f"{where}.{key}", list(pair), "[out, in] >= 0")
    return out, into


def _layers(record: Mapping[str, Any]) -> tuple[Layer, ...]:
    _need(record, "layers", "it")
    return tuple(
        Layer(
            name=_string(_need(entry, "name", where), f"{where}.name"),
            kind=str(_optional(entry, "kind", "")),
            before=_width(entry, "before", where),
            after=_width(entry, "after", where),
            macs_before=number(entry.get("macs_before")),
            macs_after=number(entry.get("macs_after")),
            parameters_before=number(entry.get("parameters_before")),
            parameters_after=number(entry.get("parameters_after")),
        )
        for where, entry in _entries(record, "layers")
    )


def _steps(record: Mapping[str, Any]) -> tuple[Step, ...]:
    found = [
        Step(
            step=_integer(_need(entry, "step", where), f"{where}.step"),
            call=whole(entry.get("call")),
            macs_share=number(entry.get("macs_share")),
            sparsity=_per_group(entry, "sparsity", where),
            sparsity_ema=_per_group(entry, "sparsity_ema", where),
            widths=_per_group(entry, "widths", where),
            pruned=_per_group_indices(entry, "pruned", where),
            returned=_per_group_indices(entry, "returned", where),
            gave=_per_group(entry, "gave", where),
        )
        for where, entry in _entries(record, "steps")
    ]
    return tuple(sorted(found, key=lambda step: step.step))


def _windows(record: Mapping[str, Any]) -> tuple[Window, ...]:
    found: list[Window] = []
    for where, entry in _entries(record, "windows"):
        step = _integer(_need(entry, "step", where), f"{where}.step")
        candidates = tuple(
            Candidate(
                step=step,
                group=_string(_need(item, "group", f"{where}.{inner}"), f"{where}.{inner}.group"),
                channel=_integer(
                    _need(item, "channel", f"{where}.{inner}"), f"{where}.{inner}.channel"
                ),
                value=number(item.get("value")),
                z=number(item.get("z")),
                restored=item.get("restored") is True,
                reason=str(_optional(item, "reason", "")),
            )
            for inner, item in _entries(entry, "candidates")
        )
        per_group = {
            key: _per_group(entry, key, where) for key in ("supervised", "prices", "factors")
        }
        found.append(Window(step=step, candidates=candidates, **per_group))
    return tuple(sorted(found, key=lambda window: window.step))


def _history(record: Mapping[str, Any]) -> tuple[Epoch, ...]:
    found: list[Epoch] = []
    for i, (_, entry) in enumerate(_entries(record, "history")):
        epoch = number(entry.get("epoch"))
        found.append(
            Epoch(
                epoch=float(i + 1) if epoch is None else epoch,
                phase=str(_optional(entry, "phase", "")),
                loss=number(entry.get("train_loss")),
                accuracy=number(entry.get("val_accuracy")),
                macs_share=number(entry.get("macs_share")),
                lr=number(entry.get("lr")),
                seconds=number(entry.get("seconds")),
            )
        )
    return tuple(sorted(found, key=lambda epoch: epoch.epoch))


def _latency(side: Mapping[str, Any], key: str, where: str) -> Latency | None:
    if side.get(key) is None:
        return None
    entry = _mapping(side[key], f"{where}.{key}")
    found = Latency(**{name: number(entry.get(name)) for name in ("median", "p20", "p80")})
    return None if found == Latency(median=None, p20=None, p80=None) else found


def _side(compare: Mapping[str, Any], key: str) -> Side:
    where = f"compare.{key}"
    entry = _mapping(_optional(compare, key, {}), where)
    return Side(
        **{n: number(entry.get(n)) for n in ("accuracy", "macs", "parameters", "file_bytes")},
        latency=_latency(entry, "latency_ms", where),
        onnx_latency=_latency(entry, "onnx_latency_ms", where),
    )


def read(record: Mapping[str, Any]) -> Record:
    """Checks a record and returns it typed.

    Raises:
        ArgumentError: the record is of another format or version, or broken.
    """
    if not isinstance(record, Mapping) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, Mapping) else type(record).__name__
        advice = f"wanted {FORMAT!r}; pass what psap.record.build(result) returned"
        raise ArgumentError(f"not a report record: its format is {found!r}, {advice}")
    if record.get("version") != VERSION:
        raise ArgumentError(
            f"the report record has version {record.get('version')!r}, this psap reads version"
            f" {VERSION}; render it with the psap that wrote it"
        )
    compare = _mapping(_optional(record, "compare", {}), "compare")
    onnx = _mapping(_optional(record, "onnx", {}), "onnx")
    return Record(
        title=_string(_optional(record, "title", "Pruned network"), "title"),
        created=_string(_optional(record, "created", ""), "created"),
        command=_string(_optional(record, "command", ""), "command"),
        seed=whole(record.get("seed")),
        environment=dict(_mapping(_optional(record, "environment", {}), "environment")),
        config=dict(_mapping(_optional(record, "config", {}), "config")),
        groups=_groups(record),
        layers=_layers(record),
        left_alone=tuple(
            (str(_optional(entry, "layer", "")), str(_optional(entry, "reason", "")))
            for _, entry in _entries(record, "left_alone")
        ),
        steps=_steps(record),
        windows=_windows(record),
        history=_history(record),
        dense=_side(compare, "dense"),
        small=_side(compare, "small"),
        began_accuracy=number(compare.get("accuracy_when_pruning_began")),
        batch=whole(compare.get("batch")),
        threads=whole(compare.get("threads")),
        verification=dict(_mapping(_optional(record, "verification", {}), "verification")),
        onnx_difference=number(onnx.get("max_abs_difference")),
        time=_per_group(record, "time", "it"),
    )
