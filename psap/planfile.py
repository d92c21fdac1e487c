"""Plans as JSON text, and back with suspicion."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from psap import inputspec
from psap.cost import Cost, LayerCost
from psap.errors import ArgumentTypeError, FileError
from psap.graph.alike import packed
from psap.plans import Block, GroupPlan, Plan, SidePlan

FORMAT = "psap-plan"
VERSION = 1
MOST_POSITIONS = 1 << 26
"""A plan read from text may not list more positions than this (a guard against bombs)."""
MOST_ROUNDS = 64
"""Nor may branches have gone in more rounds, each of which takes a trace of the model."""
ROLES = ("out", "in", "cut", "state", "slope")


def _damaged(where: str) -> FileError:
    return FileError(f"the plan is damaged at {where[:80]!r}; make it again with psap.plan")


def _text(body: Mapping[str, Any], key: str) -> str:
    value = body[key]
    if not isinstance(value, str):
        raise _damaged(key)
    return value


def _whole(value: Any, where: str, most: int = 1 << 62) -> int:
    """A whole number from 0 to ``most``."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise _damaged(where)
    return value


class _Reader:
    """Reads packed index lists; together they may not hold more than a plan can need."""

    def __init__(self) -> None:
        self.left = MOST_POSITIONS

    def unpack(self, body: Mapping[str, Any], owner: str) -> tuple[int, ...]:
        """Indices of a packed list; refuses what does not rise strictly within [0, size)."""
        size, text = _whole(body["size"], owner, MOST_POSITIONS), _text(body, "kept")
        kept: list[int] = []
        last = -1
        for run in text.split(","):
            low, _, high = run.partition("-")
            if not _number(low) or (high and not _number(high)):
                raise FileError(f"the plan is damaged at {owner!r}: {run[:40]!r} is no index range")
            first, end = int(low), int(high or low)
            if first <= last or end < first or end >= size:
                raise FileError(
                    f"the plan is damaged at {owner!r}: {run[:40]!r} is out of order or range"
                )
            self.left -= end + 1 - first
            if self.left < 0:
                raise FileError(f"the plan lists more than {MOST_POSITIONS} positions")
            kept.extend(range(first, end + 1))
            last = end
        return tuple(kept)


def _number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 20


def to_json(plan: Plan) -> str:
    """A plan as JSON text; index lists are written as ranges such as "0-3,7"."""
    body = {
        "format": FORMAT,
        "version": VERSION,
        "architecture": plan.architecture,
        "groups": [
            {**vars(g), "kept": packed(g.kept), "layers": list(g.layers)} for g in plan.groups
        ],
        "sides": [
            {"name": s.name, "dim": s.dim, "role": s.role, "size": s.size, "kept": packed(s.kept)}
            for s in plan.sides
        ],
        "before": vars(plan.before),
        "after": vars(plan.after),
        "layers": [[vars(a), vars(b)] for a, b in plan.layers],
        "left_alone": dict(plan.left_alone),
        "inputs": inputspec.to_json(plan.inputs),
        "dropped": [[block.name, list(block.tensors)] for block in plan.dropped],
        "without": [list(names) for names in plan.without],
    }
    return json.dumps(body)


def from_json(text: str) -> Plan:
    """Read a plan from JSON text.

    Raises:
        ArgumentTypeError: it is no text.
        FileError: it is no plan, is damaged, or has another version.
    """
    if not isinstance(text, str):
        raise ArgumentTypeError(f"text is a {type(text).__name__}; pass the text of Plan.to_json()")
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(f"this is no plan: {error}; pass the text of Plan.to_json()") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise FileError("this is no plan; pass the text of Plan.to_json()")
    if body.get("version") != VERSION:
        raise FileError(
            f"the plan has format version {str(body.get('version'))[:40]}, this psap reads "
            f"{VERSION}; upgrade psap, or make the plan again"
        )
    try:
        return _from_body(body)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise FileError(
            f"the plan is damaged ({type(error).__name__}: {str(error)[:80]}); make it again with "
            "psap.plan"
        ) from error


def _from_body(body: Mapping[str, Any]) -> Plan:
    reader = _Reader()
    return Plan(
        architecture=_text(body, "architecture"),
        groups=tuple(_group(g, reader) for g in body["groups"]),
        sides=tuple(_side(s, reader) for s in body["sides"]),
        before=_cost(body["before"], "before"),
        after=_cost(body["after"], "after"),
        layers=tuple((_layer(a), _layer(b)) for a, b in body["layers"]),
        left_alone={name: _text(body["left_alone"], name) for name in body["left_alone"]},
        inputs=inputspec.from_json(body["inputs"]),
        dropped=tuple(_block(entry) for entry in _list(body, "dropped")),
        without=tuple(_names(entry) for entry in _list(body, "without", MOST_ROUNDS)),
    )


def _list(body: Mapping[str, Any], key: str, most: int = 1 << 20) -> list[Any]:
    """A list; older plans do not have it."""
    found = body.get(key, [])
    if not isinstance(found, list) or len(found) > most:
        raise _damaged(key)
    return found


def _block(entry: Any) -> Block:
    name, tensors = entry
    if not isinstance(name, str):
        raise _damaged("dropped")
    return Block(name, _names(tensors))


def _names(entry: Any) -> tuple[str, ...]:
    if not isinstance(entry, list) or not all(type(name) is str for name in entry) or not entry:
        raise _damaged("the names of residual branches")
    return tuple(entry)


def _group(body: Mapping[str, Any], reader: _Reader) -> GroupPlan:
    name, layers = _text(body, "name"), body["layers"]
    if not isinstance(layers, list) or not all(isinstance(layer, str) for layer in layers):
        raise _damaged(name)
    kept = reader.unpack(body, name)
    part = _text(body, "part") if "part" in body else ""  # older plans do not say it
    return GroupPlan(name, body["size"], kept, tuple(layers), part)


def _side(body: Mapping[str, Any], reader: _Reader) -> SidePlan:
    name, role = _text(body, "name"), _text(body, "role")
    if role not in ROLES:
        raise _damaged(name)
    kept = reader.unpack(body, name)
    return SidePlan(name, _whole(body["dim"], name, 64), role, body["size"], kept)


def _cost(body: Mapping[str, Any], where: str) -> Cost:
    activations, milliseconds = body.get("activations"), body.get("latency_ms")
    if milliseconds is not None and not (type(milliseconds) is float and 0 <= milliseconds < 1e9):
        raise _damaged(where)
    return Cost(
        _whole(body["macs"], where),
        _whole(body["parameters"], where),
        None if activations is None else _whole(activations, where),
        milliseconds,
    )


def _layer(body: Mapping[str, Any]) -> LayerCost:
    name = _text(body, "weight")
    shape = tuple(_whole(size, name) for size in body["shape"])
    return LayerCost(name, shape, _whole(body["macs"], name))
