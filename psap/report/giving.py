"""Tables of what each prune step took from which groups, and why; and of prices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from psap.report.record import Group, Step, Window
from psap.report.text import DASH, code, details, escape, percent, plain_number, table

_SHOWN = 3  # groups of a step


def most(groups: Sequence[Group], steps: Sequence[Step], windows: Sequence[Window]) -> str:
    """The groups that gave most at each step, with what decided it; empty if it is not known."""
    sizes = {group.name: group.size for group in groups}
    parts = {group.name: group.part for group in groups}
    factors: Mapping[str, float | None] = {}
    rows, before = [], dict[str, float | None](sizes)
    for step in steps:
        given = sorted((-(v or 0.0), name) for name, v in step.gave.items() if name in sizes)
        for amount, name in given[:_SHOWN]:
            if amount >= 0:
                break
            rows.append(
                [
                    str(step.step),
                    percent(step.macs_share),
                    code(name, parts[name]),
                    percent(-amount),
                    f"{_width(before, name)} → {_width(step.widths, name)}",
                    percent(step.sparsity_ema.get(name)),
                    _rank(name, step.sparsity_ema),
                    plain_number(factors.get(name)),
                ]
            )
        before = step.widths
        factors = next((w.factors for w in windows if w.step == step.step), {})
    if not rows:
        return ""
    head = [
        "step",
        "MACs kept",
        "<group",
        "gave, of all MACs",
        "width",
        "sparsity",
        "rank",
        "factor",
    ]
    priced = any(window.factors for window in windows)
    if not priced:
        head, rows = head[:-1], [row[:-1] for row in rows]
    return (
        f"<h3>Who gave most</h3><p>The {_SHOWN} groups whose new width saves most at each step."
        " Rank is the place by sparsity, the sparsest first: a group gives much if it is sparse, or"
        " large.</p>" + table(head, rows)
    )


def _width(widths: Mapping[str, float | None], name: str) -> str:
    value = widths.get(name)
    return DASH if value is None else f"{value:.0f}"


def _rank(name: str, sparsity: Mapping[str, float | None]) -> str:
    known = [value for value in sparsity.values() if value is not None]
    own = sparsity.get(name)
    if own is None:
        return DASH
    return f"{1 + sum(value > own for value in known)} of {len(known)}"


def prices(windows: Sequence[Window]) -> str:
    """What supervision found a unit of cost to be worth, per group; empty without prices."""
    rows = [
        [
            f"<code>{escape(name)}</code>",
            str(window.step),
            plain_number(window.prices.get(name)),
            plain_number(factor),
        ]
        for window in windows
        for name, factor in window.factors.items()
    ]
    head = ["group", "step", "price", "factor on the next width"]
    return details("All prices as a table", table(head, rows)) if rows else ""
