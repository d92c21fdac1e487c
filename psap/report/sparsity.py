"""Pictures of the sparsity ratios over the prune steps, and the pruning ratios they led to."""

from __future__ import annotations

from collections.abc import Sequence

from psap.report import svg
from psap.report.giving import most, prices
from psap.report.record import Group, Step, Window
from psap.report.text import DASH, code, details, escape, percent, shorten, table

_SMALL_MULTIPLES = 12  # groups up to which each has a picture of its own
_NUMBERS = 8  # steps up to which the cells of the heat map carry numbers
_SCROLL = 80


def pruning_ratio(group: Group, step: Step) -> float | None:
    """Share of the group's channels that is pruned after the step."""
    width = step.widths.get(group.name)
    return None if width is None or group.size == 0 else 1 - width / group.size


def followed(groups: Sequence[Group], steps: Sequence[Step]) -> list[Group]:
    """The groups whose sparsity was measured at some step."""
    return [g for g in groups if any(step.sparsity.get(g.name) is not None for step in steps)]


def _hint(group: Group, step: Step) -> str:
    name = group.name
    part = f"\n{group.part}" if group.part else ""
    return (
        f"{name}, step {step.step}{part}\nsparsity ratio {percent(step.sparsity.get(name))}"
        f"\nmoving average {percent(step.sparsity_ema.get(name))}"
        f"\npruned {percent(pruning_ratio(group, step))}"
    )


def _clip(value: float) -> float:
    return min(max(value, 0.0), 1.0)


def _panel(group: Group, steps: Sequence[Step], identity: str) -> str:
    height, slot = 84.0, 1 / len(steps)
    body = []
    for share in (0.0, 0.5, 1.0):
        y = height * (1 - share)
        body.append(svg.line(0, y, 1, y, "grid"))
        body.append(svg.label(f"{share:.0%}", -7, y, "tick end mid"))
    points: list[svg.Point | None] = []
    averages: list[svg.Point | None] = []
    front, every = [], max(1, -(-len(steps) // 10))
    for i, step in enumerate(steps):
        x = (i + 0.5) * slot
        share = _clip(pruning_ratio(group, step) or 0.0)
        size = height * share
        body.append(svg.bar(x - 0.32 * slot, 0.64 * slot, height - size, size, "ratio"))
        for values, into in ((step.sparsity, points), (step.sparsity_ema, averages)):
            value = values.get(group.name)
            into.append(None if value is None else (x, _clip(value)))
        point = points[-1]
        if point is not None:
            y = height * (1 - point[1])
            front.append(svg.tag("circle", cx=svg.across(x), cy=y, r=3, class_="dot sparsity"))
        if i % every == 0:
            front.append(svg.label(str(step.step), svg.across(x), height + 15, "tick middle"))
        front.append(svg.bar(i * slot, slot, 0, height, "hover", svg.hint(_hint(group, step))))
    body.append(svg.curve(averages, 0, height, "curve average"))
    body.append(svg.curve(points, 0, height, "curve sparsity"))
    picture = svg.picture(
        "".join(body + front),
        identity=identity,
        title=f"Sparsity and pruning ratio of {group.name}",
        description=f"{len(steps)} prune steps; the table below has the numbers.",
        height=height + 20,
        left=38,
        right=4,
    )
    caption = (
        f'<figcaption><code title="{escape(group.name)}">{escape(shorten(group.name, 24))}</code>'
        f"<span>{group.size} → {len(group.kept)}</span>"
        + (f"<small>{escape(group.part)}</small>" if group.part else "")
        + "</figcaption>"
    )
    return f"<figure>{caption}{picture}</figure>"


def _multiples(groups: Sequence[Group], steps: Sequence[Step]) -> str:
    legend = (
        '<p class="legend"><span><i class="swatch line sparsity"></i>sparsity ratio</span>'
        '<span><i class="swatch line average"></i>its moving average</span>'
        '<span><i class="swatch ratio"></i>pruning ratio that came out of it</span></p>'
    )
    panels = [_panel(group, steps, f"sparsity-{i}") for i, group in enumerate(groups)]
    return f'{legend}<div class="multiples">{"".join(panels)}</div>'


def _label(group: Group) -> str:
    """A group's name beside its row; the hover text says which part of a layer it is."""
    return shorten(group.name, 22) + (" (part)" if group.part else "")


def _heat_row(
    group: Group, steps: Sequence[Step], y: float, height: float, scale: tuple[float, float]
) -> str:
    low, high = scale
    slot, parts = 0.485 / len(steps), []
    for side, class_ in ((0.0, "heat sparsity"), (0.515, "heat ratio")):
        for i, step in enumerate(steps):
            if side:
                value = pruning_ratio(group, step)
                strength = value
            else:
                value = step.sparsity.get(group.name)
                strength = None if value is None else (value - low) / (high - low)
            x = side + i * slot
            hint = svg.hint(_hint(group, step))
            if value is None or strength is None:
                parts.append(svg.bar(x, slot, y, height, "hover", hint))
                continue
            opacity = 0.06 + 0.94 * _clip(strength)
            rect = svg.tag(
                "rect",
                hint,
                x=svg.across(x),
                width=svg.across(slot),
                y=y,
                height=height,
                fill_opacity=opacity,
                class_=class_,
            )
            text = ""
            if len(steps) <= _NUMBERS:
                ink = "cell over-strong" if opacity > 0.78 else "cell"
                text = svg.label(
                    f"{100 * value:.0f}", svg.across(x + slot / 2), y + height / 2, ink
                )
            parts.append(rect + text)
    parts.append(svg.label(_label(group), -10, y + height / 2, "name end mid"))
    return svg.tag("g", "".join(parts), class_="row")


def _heat_map(groups: Sequence[Group], steps: Sequence[Step]) -> str:
    values = [v for g in groups for s in steps if (v := s.sparsity.get(g.name)) is not None]
    low, high = min(values), max(values)
    scale = (low, high if high > low else low + 1)
    top, height, slot = 38.0, 17.0, 0.485 / len(steps)
    body = [
        svg.label("sparsity ratio, %", "0", 12, "head"),
        svg.label("pruning ratio, %", "51.5%", 12, "head"),
    ]
    every = max(1, -(-len(steps) // 8))
    for i, step in enumerate(steps):
        if i % every == 0:
            for side in (0.0, 0.515):
                x = svg.across(side + (i + 0.5) * slot)
                body.append(svg.label(str(step.step), x, top - 7, "tick middle"))
    for i, group in enumerate(groups):
        body.append(_heat_row(group, steps, top + i * (height + 1), height, scale))
    picture = svg.picture(
        "".join(body),
        identity="sparsity",
        title="Sparsity ratio and pruning ratio of each group at each prune step",
        description=f"{len(groups)} groups as rows, {len(steps)} prune steps as columns, sparsity"
        " on the left, pruning ratio on the right. The table below has the numbers.",
        height=top + len(groups) * (height + 1) + 2,
        left=18 + 7.0 * max(len(_label(group)) for group in groups),
    )
    legend = (
        f'<p class="legend"><span>columns are prune steps; colours of the left half run from'
        f" {percent(low)} (pale) to {percent(high)} (strong)</span></p>"
    )
    return legend + (f'<div class="tall">{picture}</div>' if len(groups) > _SCROLL else picture)


def _step_table(groups: Sequence[Group], steps: Sequence[Step]) -> str:
    head = ["group", "step", "sparsity", "moving average", "width", "pruned", "newly", "returned"]
    rows = []
    for group in groups:
        name = group.name
        for step in steps:
            width = step.widths.get(name)
            rows.append(
                [
                    code(name, group.part),
                    str(step.step),
                    percent(step.sparsity.get(name)),
                    percent(step.sparsity_ema.get(name)),
                    DASH if width is None else f"{width:.0f} of {group.size}",
                    percent(pruning_ratio(group, step)),
                    str(len(step.pruned.get(name, ()))),
                    str(len(step.returned.get(name, ()))),
                ]
            )
    return details("All ratios as a table", table(head, rows))


def section(groups: Sequence[Group], steps: Sequence[Step], windows: Sequence[Window] = ()) -> str:
    """Picture and tables of the sparsity ratios, and what came of them; empty without ratios."""
    measured = followed(groups, steps)
    if not measured:
        return ""
    draw = _multiples if len(measured) <= _SMALL_MULTIPLES else _heat_map
    told = most(groups, steps, windows) + _step_table(measured, steps) + prices(windows)
    return draw(measured, steps) + told
