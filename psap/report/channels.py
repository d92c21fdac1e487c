"""The channel map: one cell per channel, coloured by its fate; and the table of restored ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from psap.report import svg
from psap.report.fates import Fate, Life, lives, restored, tally
from psap.report.record import Candidate, Group, Step, Window
from psap.report.text import DASH, code, details, escape, ranges, scientific, shorten, table

_PITCH, _CELL = 12, 10
_SCROLL = 80
_ROWS = 500  # longest table of candidates

_LEGEND = {
    Fate.KEPT: "kept",
    Fate.LEFT_ALONE: "left alone",
    Fate.RESTORED: "restored in a window (+ how many)",
    Fate.RETURNED: "brought back by the ranking",
    Fate.PRUNED_AGAIN: "came back, pruned again",
}


def _cells(first: int, last: int, per_row: int, inset: float = 0.0) -> str:
    size = _CELL - 2 * inset
    moves = []
    for i in range(first, last + 1):
        x, y = _PITCH * (i % per_row) + inset, _PITCH * (i // per_row) + inset
        moves.append(f"M{x:g} {y:g}h{size:g}v{size:g}h{-size:g}z")
    return "".join(moves)


def _run(first: int, last: int, life: Life, per_row: int, shade: float | None) -> str:
    which = f"channel {first}" if first == last else f"channels {ranges(range(first, last + 1))}"
    inner = [svg.tag("path", d=_cells(first, last, per_row), fill_opacity=shade)]
    if life.fate in (Fate.RETURNED, Fate.PRUNED_AGAIN):
        inner.append(svg.tag("path", d=_cells(first, last, per_row, inset=3), class_="mark"))
    inner.append(svg.hint(f"{which}\n{life.story}"))
    return svg.tag("g", "".join(inner), class_=f"cells {life.fate.value}")


def shade(step: int | None, steps: Sequence[Step]) -> float | None:
    """Opacity of a pruned channel: the earlier it went, the fainter."""
    if step is None or len(steps) < 2:
        return None
    last = max(item.step for item in steps)
    return 0.22 + 0.78 * min(step / last, 1.0) if last else None


def _map(
    group: Group, fates: Sequence[Life], steps: Sequence[Step], per_row: int, identity: str
) -> str:
    runs = []
    for life, run in groupby(enumerate(fates), key=lambda item: item[1]):
        indices = [i for i, _ in run]
        runs.append(_run(indices[0], indices[-1], life, per_row, shade(life.step, steps)))
    rows = max(1, -(-group.size // per_row))
    drawing = svg.tag(
        "svg",
        svg.named(
            identity,
            f"Channels of {group.name}",
            f"{group.size} channels, {len(group.kept)} kept; the table below lists them.",
        )
        + "".join(runs),
        role="img",
        aria_labelledby=f"{identity}-t {identity}-d",
        viewBox=f"0 0 {_PITCH * per_row - 2} {_PITCH * rows - 2}",
        class_="map",
    )
    note = f"{group.size} → {len(group.kept)}" if group.reason is None else f"{group.size}"
    back = sum(life.fate is Fate.RESTORED for life in fates)
    extra = f'<b class="restored" title="{back} restored">+{back}</b>' if back else ""
    name = f'<code title="{escape(group.name)}">{escape(shorten(group.name, 26))}</code>'
    part = f"<small>{escape(group.part)}</small>" if group.part else ""
    return f'<div class="group"><p>{name}<span>{note}</span>{extra}{part}</p>{drawing}</div>'


def _legend(every: Sequence[Sequence[Life]], steps: Sequence[Step]) -> str:
    present = {life.fate for fates in every for life in fates}
    items = [
        f'<span><i class="swatch {fate.value}"></i>{text}</span>'
        for fate, text in _LEGEND.items()
        if fate in present
    ]
    if present & {Fate.PRUNED, Fate.PRUNED_AGAIN}:
        numbers = [step.step for step in steps]
        shown = numbers if len(numbers) <= 8 else [numbers[0], numbers[-1]]
        shades = "".join(
            f'<i class="swatch gone" style="opacity:{shade(t, steps) or 1:.2f}"></i>{t}'
            for t in shown
        )
        text = f"pruned at step {shades}" if shown else '<i class="swatch gone"></i>pruned'
        items.append(f"<span>{text}</span>")
    return f'<p class="legend">{"".join(items)}</p>'


def _fate_table(groups: Sequence[Group], every: Sequence[Sequence[Life]]) -> str:
    rows = []
    for group, fates in zip(groups, every, strict=True):
        by_step: dict[int, list[int]] = {}
        for i, life in enumerate(fates):
            if life.step is not None:
                by_step.setdefault(life.step, []).append(i)
        gone = "; ".join(f"step {t}: {ranges(found)}" for t, found in sorted(by_step.items()))
        if not by_step:
            gone = ranges(i for i in range(group.size) if i not in group.kept)
        picked = [
            ranges(i for i, life in enumerate(fates) if life.fate is fate)
            for fate in (Fate.RESTORED, Fate.RETURNED, Fate.PRUNED_AGAIN)
        ]
        rows.append([code(group.name, group.part), ranges(group.kept), gone, *picked])
    head = ["group", "<kept", "<pruned", "<restored", "<by the ranking", "<pruned again"]
    return details("All channels as a table", table(head, rows))


def _candidate_row(item: Candidate, alive: str) -> list[str]:
    return [
        f"<code>{escape(item.group)}</code>",
        str(item.channel),
        str(item.step),
        DASH if item.z is None else f"{item.z:.2f}",
        scientific(item.value),
        escape(item.reason) or DASH,
        alive,
    ]


def _candidate_table(items: Sequence[Candidate], groups: Sequence[Group]) -> str:
    kept = {group.name: group.kept for group in groups}
    rows = []
    for item in items[:_ROWS]:
        alive = DASH
        if item.group in kept:
            alive = "yes" if item.channel in kept[item.group] else "no"
        rows.append(_candidate_row(item, alive))
    head = ["group", "channel", "step", "z", "value", "<reason", "<alive at the end"]
    more = len(items) - len(rows)
    note = f'<p class="note">… and {more} more.</p>' if more else ""
    return table(head, rows) + note


def supervision(groups: Sequence[Group], windows: Sequence[Window]) -> str:
    """What the windows watched and restored; empty if there was none."""
    if not windows:
        return ""
    back = restored(windows)
    others = [item for window in windows for item in window.candidates if not item.restored]
    watched = sum(value or 0 for window in windows for value in window.supervised.values())
    parts = [
        f"<h3>Supervised and restored</h3><p>{watched:.0f} freshly pruned channels were watched in"
        f" {len(windows)} window{'s' * (len(windows) != 1)}; {len(back)} came back. A positive"
        " value means that opening the gate would lower the loss; z is its significance.</p>"
    ]
    if back:
        parts.append(_candidate_table(back, groups))
    if others:
        content = _candidate_table(others, groups)
        parts.append(
            details(f"Watched, of positive value, yet not restored ({len(others)})", content)
        )
    return "".join(parts)


def _came_back(counts: Mapping[str, int]) -> str:
    """Whether protection earned anything: how many came back, and how many of those stayed."""
    parts = [
        f"{counts[kind]} {how}, {counts[f'{kind}_stayed']} of them are in the final network"
        for kind, how in (
            ("restored", "restored by supervision"),
            ("returned", "brought back by the ranking"),
        )
        if counts[kind]
    ]
    told = "; ".join(parts) or "none came back"
    return f"<p>{counts['pruned']} channels are gone. Of those once pruned: {told}.</p>"


def section(groups: Sequence[Group], steps: Sequence[Step], windows: Sequence[Window]) -> str:
    """Channel map, its table, and what supervision did."""
    every = [lives(group, steps, windows) for group in groups]
    wide = max(group.size for group in groups) > 256 or sum(g.size for g in groups) > 6000
    per_row = 128 if wide else 64
    maps = [
        _map(group, fates, steps, per_row, f"map-{i}")
        for i, (group, fates) in enumerate(zip(groups, every, strict=True))
    ]
    drawing = f'<div class="maps">{"".join(maps)}</div>'
    if len(groups) > _SCROLL:
        drawing = f'<div class="tall">{drawing}</div>'
    told = _came_back(tally(groups, steps, windows)) if steps or windows else ""
    if any(group.part for group in groups):
        told += (
            "<p>A group that is a part of a layer says which channels of the layer it is; its own"
            " are counted from 0.</p>"
        )
    tables = _fate_table(groups, every) + supervision(groups, windows)
    return _legend(every, steps) + drawing + told + tables
