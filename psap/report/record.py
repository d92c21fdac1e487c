"""Reads a report record into typed, immutable values; says which key is broken.

Structure is strict (a list where a list belongs, names that are strings), numbers are lenient:
whatever is missing, not a number or not finite becomes None, which the page shows as a dash.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from psap.errors import ArgumentError
from psap.report.reading import (
    broken,
    entries,
    indices,
    integer,
    mapping,
    need,
    number,
    optional,
    per_group,
    per_group_indices,
    sequence,
    string,
    whole,
)

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
class Block:
    """One round of `psap.drop_blocks`: the branch that went, None before the first one."""

    block: str | None
    loss: float | None
    macs_share: float | None


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
    blocks: tuple[Block, ...]
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


def _groups(record: Mapping[str, Any]) -> tuple[Group, ...]:
    need(record, "groups", "it")
    found: list[Group] = []
    for where, entry in entries(record, "groups"):
        size = integer(need(entry, "size", where), f"{where}.size")
        if size > MAX_CHANNELS:
            raise broken(f"{where}.size", size, f"at most {MAX_CHANNELS} channels")
        reason = entry.get("reason")
        layers = sequence(optional(entry, "layers", ()), f"{where}.layers")
        found.append(
            Group(
                name=string(need(entry, "name", where), f"{where}.name"),
                size=size,
                kept=indices(need(entry, "kept", where), f"{where}.kept", size),
                reason=None if reason is None else string(reason, f"{where}.reason"),
                layers=tuple(string(name, f"{where}.layers") for name in layers),
                part=string(optional(entry, "part", ""), f"{where}.part"),
            )
        )
    return tuple(found)


def _width(entry: Mapping[str, Any], key: str, where: str) -> tuple[int | None, int | None]:
    pair = sequence(need(entry, key, where), f"{where}.{key}")
    if len(pair) != 2:
        raise broken(f"{where}.{key}", list(pair), "[out, in]")
    out, into = whole(pair[0]), whole(pair[1])
    if min(out or 0, into or 0) < 0:
        raise broken(f"{where}.{key}", list(pair), "[out, in] >= 0")
    return out, into


def _layers(record: Mapping[str, Any]) -> tuple[Layer, ...]:
    need(record, "layers", "it")
    return tuple(
        Layer(
            name=string(need(entry, "name", where), f"{where}.name"),
            kind=str(optional(entry, "kind", "")),
            before=_width(entry, "before", where),
            after=_width(entry, "after", where),
            macs_before=number(entry.get("macs_before")),
            macs_after=number(entry.get("macs_after")),
            parameters_before=number(entry.get("parameters_before")),
            parameters_after=number(entry.get("parameters_after")),
        )
        for where, entry in entries(record, "layers")
    )


def _blocks(record: Mapping[str, Any]) -> tuple[Block, ...]:
    found = []
    for where, entry in entries(record, "blocks"):
        name = entry.get("block")
        block = Block(
            block=None if name is None else string(name, f"{where}.block"),
            loss=number(entry.get("loss")),
            macs_share=number(entry.get("macs_share")),
        )
        found.append(block)
    return tuple(found)


def _steps(record: Mapping[str, Any]) -> tuple[Step, ...]:
    found = [
        Step(
            step=integer(need(entry, "step", where), f"{where}.step"),
            call=whole(entry.get("call")),
            macs_share=number(entry.get("macs_share")),
            sparsity=per_group(entry, "sparsity", where),
            sparsity_ema=per_group(entry, "sparsity_ema", where),
            widths=per_group(entry, "widths", where),
            pruned=per_group_indices(entry, "pruned", where),
            returned=per_group_indices(entry, "returned", where),
            gave=per_group(entry, "gave", where),
        )
        for where, entry in entries(record, "steps")
    ]
    return tuple(sorted(found, key=lambda step: step.step))


def _windows(record: Mapping[str, Any]) -> tuple[Window, ...]:
    found: list[Window] = []
    for where, entry in entries(record, "windows"):
        step = integer(need(entry, "step", where), f"{where}.step")
        candidates = tuple(
            Candidate(
                step=step,
                group=string(need(item, "group", f"{where}.{inner}"), f"{where}.{inner}.group"),
                channel=integer(
                    need(item, "channel", f"{where}.{inner}"), f"{where}.{inner}.channel"
                ),
                value=number(item.get("value")),
                z=number(item.get("z")),
                restored=item.get("restored") is True,
                reason=str(optional(item, "reason", "")),
            )
            for inner, item in entries(entry, "candidates")
        )
        told = {key: per_group(entry, key, where) for key in ("supervised", "prices", "factors")}
        found.append(Window(step=step, candidates=candidates, **told))
    return tuple(sorted(found, key=lambda window: window.step))


def _history(record: Mapping[str, Any]) -> tuple[Epoch, ...]:
    found: list[Epoch] = []
    for i, (_, entry) in enumerate(entries(record, "history")):
        epoch = number(entry.get("epoch"))
        found.append(
            Epoch(
                epoch=float(i + 1) if epoch is None else epoch,
                phase=str(optional(entry, "phase", "")),
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
    entry = mapping(side[key], f"{where}.{key}")
    found = Latency(**{name: number(entry.get(name)) for name in ("median", "p20", "p80")})
    return None if found == Latency(median=None, p20=None, p80=None) else found


def _side(compare: Mapping[str, Any], key: str) -> Side:
    where = f"compare.{key}"
    entry = mapping(optional(compare, key, {}), where)
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
    compare = mapping(optional(record, "compare", {}), "compare")
    onnx = mapping(optional(record, "onnx", {}), "onnx")
    return Record(
        title=string(optional(record, "title", "Pruned network"), "title"),
        created=string(optional(record, "created", ""), "created"),
        command=string(optional(record, "command", ""), "command"),
        seed=whole(record.get("seed")),
        environment=dict(mapping(optional(record, "environment", {}), "environment")),
        config=dict(mapping(optional(record, "config", {}), "config")),
        groups=_groups(record),
        layers=_layers(record),
        blocks=_blocks(record),
        left_alone=tuple(
            (str(optional(entry, "layer", "")), str(optional(entry, "reason", "")))
            for _, entry in entries(record, "left_alone")
        ),
        steps=_steps(record),
        windows=_windows(record),
        history=_history(record),
        dense=_side(compare, "dense"),
        small=_side(compare, "small"),
        began_accuracy=number(compare.get("accuracy_when_pruning_began")),
        batch=whole(compare.get("batch")),
        threads=whole(compare.get("threads")),
        verification=dict(mapping(optional(record, "verification", {}), "verification")),
        onnx_difference=number(onnx.get("max_abs_difference")),
        time=per_group(record, "time", "it"),
    )
