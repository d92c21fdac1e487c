"""Puts the page together: head, sections, closing details."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from psap.errors import ArgumentError
from psap.report import channels, compare, depth, history, sparsity, widths
from psap.report.reading import number
from psap.report.record import Record
from psap.report.style import SCRIPT, STYLE
from psap.report.text import (
    DASH,
    count,
    details,
    escape,
    percent,
    plain_number,
    scientific,
    short_count,
    times,
)

_INTRO = {
    "depth": "Residual branches that were removed, whole, before channels were pruned: always that"
    " which cost least loss per share of the MACs. Each bears the name of its largest layer. The"
    " network was not trained in between.",
    "widths": "Channels that each layer puts out. What is pale was removed, physically: the small"
    " network never computes it.",
    "sparsity": "The share of a group's weights that are small against their layer's spread. The"
    " sparser a group is, the more of it each prune step takes.",
    "channels": "One cell per channel of every group of channels that must be pruned together."
    " A pruned channel waits behind an almost closed gate. It comes back if its group gets wider,"
    " or, under supervision, if gradients say that it is missed.",
    "plain channels": "One cell per channel of every group of channels that must be pruned"
    " together.",
    "history": "Accuracy, loss and cost on one time axis.",
    "comparison": "The dense network against the small one.",
    "cost": "Wall-clock time between the first and the last optimizer step with the pruner,"
    " evaluation included; on a GPU what the host waited for.",
    "alone": "Layers that were not pruned, and why.",
}


def _section(title: str, intro: str, content: str, class_: str = "") -> str:
    if not content:
        return ""
    kind = f' class="{class_}"' if class_ else ""
    return f"<section{kind}><h2>{title}</h2><p>{intro}</p>{content}</section>"


def _lede(record: Record) -> str:
    macs, dense, small = compare.macs(record), record.dense.accuracy, record.small.accuracy
    parts = []
    if macs.share is not None:
        parts.append(
            f"A network of {short_count(macs.dense)} MACs became one of"
            f" <b>{short_count(macs.small)}</b>: {times(macs.factor)} less work per input."
        )
    if dense is not None and small is not None:
        parts.append(f"Accuracy went from {percent(dense)} to <b>{percent(small)}</b>.")
    error = number(record.verification.get("max_relative_error"))
    if error is not None:
        parts.append(
            f"It computes what the dense network with the same {_switched_off(record)} switched off"
            f" computes, to a relative error of {scientific(error)}."
        )
    return f'<p class="lede">{" ".join(parts)}</p>' if parts else ""


def _switched_off(record: Record) -> str:
    return "branches and channels" if depth.gone(record.blocks) else "channels"


def _date(created: str) -> str:
    try:
        return f"{datetime.fromisoformat(created):%Y-%m-%d %H:%M %Z}".strip()
    except ValueError:
        return created


def _head(record: Record) -> str:
    when = f" · {escape(_date(record.created))}" if record.created else ""
    return (
        f'<header><p class="eyebrow"><b>psap</b> pruning report{when}</p>'
        f"<h1>{escape(record.title) or 'Pruned network'}</h1>{_lede(record)}"
        f"{widths.silhouette(record.layers)}</header>{compare.tiles(record)}"
    )


def _left_alone(record: Record) -> str:
    by_reason: dict[str, list[str]] = {}
    listed = {layer for layer, _ in record.left_alone}
    for layer, reason in record.left_alone:
        by_reason.setdefault(reason, []).append(layer)
    for group in record.groups:
        if group.reason is not None and not (group.layers and listed.issuperset(group.layers)):
            by_reason.setdefault(group.reason, []).append(group.name)
    items = []
    for reason, names in by_reason.items():
        codes = " ".join(f"<code>{escape(name)}</code>" for name in dict.fromkeys(names))
        items.append(f"<li><p>{escape(reason) or 'no reason recorded'}</p>{codes}</li>")
    return f'<ul class="why">{"".join(items)}</ul>' if items else ""


def _facts(pairs: Mapping[str, str]) -> str:
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{value}</dd>" for name, value in pairs.items())
    return f'<dl class="facts">{rows}</dl>' if rows else ""


def _verification(record: Record) -> str:
    found = record.verification
    if not found:
        return ""
    pairs = {
        "largest relative error": scientific(number(found.get("max_relative_error"))),
        "computed in": escape(found.get("dtype") or DASH),
        "checked in": escape(_joined(found.get("modes"))),
        "small network is": escape(
            {"module": "the model's own modules, edited", "graph": "a traced graph"}.get(
                str(found.get("mode")), found.get("mode") or DASH
            )
        ),
    }
    if silent := found.get("silent"):
        pairs["the same for all inputs"] = ", ".join(
            f"<code>{escape(name)}</code>" for name in silent
        )
    return _facts(pairs)


def _cost(record: Record) -> str:
    found = record.time
    if not found.get("training_s"):
        return ""
    return _facts(
        {
            "training": f"{plain_number(found['training_s'])} s,"
            f" {count(found.get('optimizer_steps'))} optimizer steps",
            "in psap's hooks": f"{plain_number(found.get('hooks_s'))} s,"
            f" {percent(found.get('hooks_share'), 2)}",
            "in prune steps": f"{plain_number(found.get('prune_steps_s'))} s",
        }
    )


def _joined(value: object) -> str:
    if isinstance(value, list | tuple):
        return " and ".join(f"{item} mode" for item in value) or DASH
    return str(value or DASH)


def _json(value: Any) -> str:
    try:
        return json.dumps(value, indent=2, ensure_ascii=False, default=lambda v: type(v).__name__)
    except (ValueError, TypeError, RecursionError) as error:
        raise ArgumentError(f"broken report record: config is not JSON ({error})") from error


def _closing(record: Record) -> str:
    parts = []
    if record.command:
        parts.append(f"<h3>Command</h3><pre>{escape(record.command)}</pre>")
    facts = {} if record.seed is None else {"seed": str(record.seed)}
    facts.update({str(key): escape(value) for key, value in record.environment.items()})
    if facts:
        parts.append(f"<h3>Environment</h3>{_facts(facts)}")
    if record.config:
        parts.append(f"<h3>Configuration</h3><pre>{escape(_json(record.config))}</pre>")
    if not parts:
        return ""
    summary = "Command, environment, configuration"
    return f"<section>{details(summary, ''.join(parts))}</section>"


def _sections(record: Record) -> str:
    gone = depth.gone(record.blocks)
    told = "channels" if record.steps or record.windows else "plain channels"
    parts = [
        _section(
            "What it comes to",
            _INTRO["comparison"],
            compare.comparison(record) + compare.latencies(record),
            "compare",
        ),
    ]
    parts.append(_section("Less depth", _INTRO["depth"], depth.section(record.blocks)))
    if record.layers:
        parts.append(_section("Widths", _INTRO["widths"], widths.section(record.layers)))
    parts.append(
        _section(
            "Training",
            _INTRO["history"],
            history.section(record.history, record.steps),
        )
    )
    parts.append(
        _section(
            "Sparsity sets the ratio",
            _INTRO["sparsity"],
            sparsity.section(record.groups, record.steps, record.windows),
        )
    )
    if record.groups:
        content = channels.section(record.groups, record.steps, record.windows)
        more = " Those of the dropped branches are not among them." if gone else ""
        parts.append(_section("Every channel", _INTRO[told] + more, content))
    parts.append(_section("Left alone", _INTRO["alone"], _left_alone(record)))
    parts.append(
        _section(
            "Verification",
            "The small network against the dense one with the same"
            f" {_switched_off(record)} switched off, on real-valued inputs.",
            _verification(record),
        )
    )
    parts.append(_section("What pruning cost the training", _INTRO["cost"], _cost(record)))
    parts.append(_closing(record))
    return "".join(parts)


def build(record: Record) -> str:
    """The whole page."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(record.title)}: psap report</title><style>{STYLE}</style></head>"
        f"<body><main>{_head(record)}{_sections(record)}"
        "<footer>Written by psap. This file is complete: it loads nothing.</footer>"
        f"</main><script>{SCRIPT}</script></body></html>\n"
    )
