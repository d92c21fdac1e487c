"""Plans as JSON text, and back with suspicion."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from psap.cost import Cost, LayerCost
from psap.errors import FileError
from psap.plans import GroupPlan, InputSpec, Plan, SidePlan

FORMAT = "psap-plan"
VERSION = 1
MOST_POSITIONS = 1 << 26
"""A plan read from text may not list more positions than this (a guard against bombs)."""


def _pack(indices: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for i in indices:
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return ",".join(f"{a}-{b}" if b > a else f"{a}" for a, b in runs)


def _unpack(text: Any, size: Any, owner: str) -> tuple[int, ...]:
    """Indices of a packed list; refuses what does not rise strictly within [0, size)."""
    if not isinstance(text, str) or isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise FileError(f"the plan is damaged at {owner!r}; make it again with psap.plan")
    kept: list[int] = []
    last = -1
    for run in text.split(","):
        low, _, high = run.partition("-")
        if not low.isdecimal() or (high and not high.isdecimal()):
            raise FileError(f"the plan is damaged at {owner!r}: {run[:40]!r} is no index range")
        first, end = int(low), int(high or low)
        if first <= last or end < first or end >= size:
            raise FileError(
                f"the plan is damaged at {owner!r}: {run[:40]!r} is out of order or range"
            )
        kept.extend(range(first, end + 1))
        last = end
    return tuple(kept)


def to_json(plan: Plan) -> str:
    """A plan as JSON text; index lists are written as ranges such as "0-3,7"."""
    body = {
        "format": FORMAT,
        "version": VERSION,
        "architecture": plan.architecture,
        "groups": [
            {"name": g.name, "size": g.size, "kept": _pack(g.kept), "layers": list(g.layers)}
            for g in plan.groups
        ],
        "sides": [
            {"name": s.name, "dim": s.dim, "role": s.role, "size": s.size, "kept": _pack(s.kept)}
            for s in plan.sides
        ],
        "before": vars(plan.before),
        "after": vars(plan.after),
        "layers": [[vars(a), vars(b)] for a, b in plan.layers],
        "left_alone": dict(plan.left_alone),
        "inputs": [None if i is None else vars(i) for i in plan.inputs],
    }
    return json.dumps(body)


def from_json(text: str) -> Plan:
    """Read a plan from JSON text.

    Raises:
        FileError: it is no plan, is damaged, or has another version.
    """
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(f"this is no plan: {error}; pass the text of Plan.to_json()") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise FileError("this is no plan; pass the text of Plan.to_json()")
    if body.get("version") != VERSION:
        raise FileError(
            f"the plan has format version {body.get('version')!r}, this psap reads {VERSION}; "
            "upgrade psap, or make the plan again"
        )
    try:
        return _from_body(body)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FileError(f"the plan is damaged ({error}); make it again with psap.plan") from error


def _from_body(body: Mapping[str, Any]) -> Plan:
    groups = tuple(
        GroupPlan(
            str(g["name"]),
            int(g["size"]),
            _unpack(g["kept"], g["size"], g["name"]),
            tuple(g["layers"]),
        )
        for g in body["groups"]
    )
    sides = tuple(
        SidePlan(
            str(s["name"]),
            int(s["dim"]),
            str(s["role"]),
            int(s["size"]),
            _unpack(s["kept"], s["size"], s["name"]),
        )
        for s in body["sides"]
    )
    layers = tuple((_layer(a), _layer(b)) for a, b in body["layers"])
    inputs = tuple(
        None if i is None else InputSpec(tuple(map(int, i["shape"])), str(i["dtype"]))
        for i in body["inputs"]
    )
    return Plan(
        architecture=str(body["architecture"]),
        groups=groups,
        sides=sides,
        before=Cost(int(body["before"]["macs"]), int(body["before"]["parameters"])),
        after=Cost(int(body["after"]["macs"]), int(body["after"]["parameters"])),
        layers=layers,
        left_alone={str(k): str(v) for k, v in body["left_alone"].items()},
        inputs=inputs,
    )


def _layer(body: Mapping[str, Any]) -> LayerCost:
    return LayerCost(str(body["weight"]), tuple(map(int, body["shape"])), int(body["macs"]))
