"""The picture of training: accuracy, loss and cost over the epochs, on one time axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from psap.report import svg
from psap.report.record import Epoch, Step
from psap.report.text import details, escape, percent, plain_number, table

PHASES = {"dense": "dense training", "prune": "pruning", "finetune": "fine-tuning"}


@dataclass(frozen=True, kw_only=True)
class _Panel:
    """One of the stacked plots."""

    title: str
    values: list[float | None]
    low: float
    high: float
    height: float
    class_: str
    stepped: bool
    show: Callable[[float | None], str]
    tick: Callable[[float], str]


def _axis(epochs: Sequence[Epoch]) -> Callable[[float], float]:
    first, last = epochs[0].epoch, epochs[-1].epoch
    pad = (last - first) / max(2 * (len(epochs) - 1), 1) or 0.5
    low, span = first - pad, last - first + 2 * pad
    return lambda epoch: (epoch - low) / span


def prune_epochs(epochs: Sequence[Epoch], steps: Sequence[Step]) -> list[tuple[float, Step]]:
    """Where the prune steps stand: the pruner is called once an epoch, after dense training."""
    calls = [step.call for step in steps if step.call is not None]
    active = [epoch for epoch in epochs if epoch.phase != "dense"]
    for candidates in (active, epochs):
        if calls and min(calls) >= 1 and max(calls) <= len(candidates):
            return [
                (candidates[step.call - 1].epoch, step) for step in steps if step.call is not None
            ]
    return []


def _phases(epochs: Sequence[Epoch]) -> list[tuple[str, float, float]]:
    x = _axis(epochs)
    found: list[tuple[str, float, float]] = []
    for i, epoch in enumerate(epochs):
        left = (x(epoch.epoch) + x(epochs[i - 1].epoch)) / 2 if i else 0.0
        if found and found[-1][0] == epoch.phase:
            continue
        if found:
            found[-1] = (found[-1][0], found[-1][1], left)
        found.append((epoch.phase, left, 1.0))
    return found


def _backdrop(epochs: Sequence[Epoch], height: float) -> str:
    parts = []
    for phase, left, right in _phases(epochs):
        kind = phase if phase in PHASES else "other"
        name = PHASES.get(phase, phase)
        parts.append(svg.bar(left, right - left, 0, height, f"phase {kind}"))
        if right - left > 0.014 * len(name):
            parts.append(svg.label(name, svg.across(left), 15, "phase-name", dx=7))
    return "".join(parts)


def _marks(marks: Sequence[tuple[float, Step]], x: Callable[[float], float], height: float) -> str:
    parts, last = [], -1.0
    for epoch, step in marks:
        at = x(epoch)
        parts.append(svg.line(at, 34, at, height, "step"))
        if at - last > 0.035:
            parts.append(svg.label(str(step.step), svg.across(at), 30, "step-name middle"))
            last = at
    return "".join(parts)


def _stairs(points: Sequence[svg.Point | None]) -> list[svg.Point | None]:
    """The same points, each value held until the next: a cost changes at once."""
    found: list[svg.Point | None] = []
    for point in points:
        if point is not None and found and found[-1] is not None:
            found.append((point[0], found[-1][1]))
        found.append(point)
    return found


def _plot(
    panel: _Panel,
    epochs: Sequence[Epoch],
    x: Callable[[float], float],
    top: float,
    reference: float | None,
) -> str:
    marks = svg.ticks(panel.low, panel.high, 4 if panel.height > 100 else 2)
    low, high = marks[0], marks[-1]

    def share(value: float) -> float:
        return (value - low) / (high - low)

    body = [svg.label(panel.title, "0", top - 9, "head")]
    for mark in marks:
        y = top + panel.height * (1 - share(mark))
        body.append(svg.line(0, y, 1, y, "grid"))
        body.append(svg.label(panel.tick(mark), -8, y, "tick end mid"))
    points = [
        None if value is None else (x(epoch.epoch), share(value))
        for epoch, value in zip(epochs, panel.values, strict=True)
    ]
    if reference is not None:
        y = top + panel.height * (1 - share(reference))
        body.append(svg.line(0, y, 1, y, "reference"))
    drawn = _stairs(points) if panel.stepped else points
    body.append(svg.curve(drawn, top, panel.height, f"curve {panel.class_}"))
    shown = [point for point in points if point is not None and point[1] > -1e-9]
    for px, py in shown if len(shown) <= 80 else shown[-1:]:
        cy = top + panel.height * (1 - py)
        body.append(
            svg.tag("circle", cx=svg.across(px), cy=cy, r=2.5, class_=f"dot {panel.class_}")
        )
    if shown:
        value = low + (high - low) * shown[-1][1]
        y = top + panel.height * (1 - shown[-1][1])
        body.append(svg.label(panel.show(value), "100%", y, f"last mid {panel.class_}", dx=8))
    return "".join(body)


def _percent_tick(value: float) -> str:
    return f"{100 * value:.4g}%"


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def dense_accuracy(epochs: Sequence[Epoch]) -> float | None:
    """Accuracy of the dense network on the data of the curve: after its last epoch."""
    found = _known([epoch.accuracy for epoch in epochs if epoch.phase == "dense"])
    return found[-1] if found else None


def _floor(epochs: Sequence[Epoch]) -> float | None:
    """The accuracy from which on it is drawn, where the first epochs would flatten all others."""
    seen = _known([epoch.accuracy for epoch in epochs])
    later = _known([epoch.accuracy for epoch in epochs if epoch.phase != "dense"])
    if later and min(seen) < min(later) - 0.1:
        return svg.ticks(min(later), max(seen))[0]
    return None


def _accuracy(epochs: Sequence[Epoch]) -> _Panel | None:
    values = [epoch.accuracy for epoch in epochs]
    seen, floor = _known(values), _floor(epochs)
    if not seen:
        return None
    if floor is not None:
        seen = [floor, max(seen)]
    return _Panel(
        title="validation accuracy",
        values=values,
        low=min(seen),
        high=max(*seen, min(seen) + 0.01),
        height=150,
        class_="accuracy",
        stepped=False,
        show=percent,
        tick=_percent_tick,
    )


def _loss(epochs: Sequence[Epoch]) -> _Panel | None:
    values = [epoch.loss for epoch in epochs]
    seen = _known(values)
    if not seen:
        return None
    return _Panel(
        title="training loss",
        values=values,
        low=min(0.0, *seen),
        high=max(0.0, *seen),
        height=84,
        class_="loss",
        stepped=False,
        show=plain_number,
        tick=plain_number,
    )


def _macs(epochs: Sequence[Epoch]) -> _Panel | None:
    values = [epoch.macs_share for epoch in epochs]
    seen = _known(values)
    if not seen:
        return None
    return _Panel(
        title="MACs kept",
        values=values,
        low=min(0.0, *seen),
        high=max(1.0, *seen),
        height=84,
        class_="macs",
        stepped=True,
        show=percent,
        tick=_percent_tick,
    )


def _panels(epochs: Sequence[Epoch]) -> list[_Panel]:
    found = (_accuracy(epochs), _loss(epochs), _macs(epochs))
    return [panel for panel in found if panel is not None]


def _hover(epochs: Sequence[Epoch], x: Callable[[float], float], height: float) -> str:
    edges = [0.0]
    for a, b in pairwise(epochs):
        edges.append((x(a.epoch) + x(b.epoch)) / 2)
    edges.append(1.0)
    parts = []
    for i, epoch in enumerate(epochs):
        hint = (
            f"epoch {epoch.epoch:g}, {PHASES.get(epoch.phase, epoch.phase)}"
            f"\naccuracy {percent(epoch.accuracy, 2)}\nloss {plain_number(epoch.loss)}"
            f"\nMACs kept {percent(epoch.macs_share)}"
        )
        parts.append(
            svg.bar(edges[i], edges[i + 1] - edges[i], 34, height - 34, "hover", svg.hint(hint))
        )
    return "".join(parts)


def chart(epochs: Sequence[Epoch], steps: Sequence[Step]) -> str:
    """The stacked plots; a dashed line is the accuracy that the dense network had."""
    x, panels = _axis(epochs), _panels(epochs)
    if not panels:
        return ""
    tops, y = [], 66.0
    for panel in panels:
        tops.append(y)
        y += panel.height + 40
    bottom = y - 40
    marks = prune_epochs(epochs, steps)
    body = [_backdrop(epochs, bottom), _marks(marks, x, bottom)]
    for panel, top in zip(panels, tops, strict=True):
        reference = dense_accuracy(epochs) if panel.class_ == "accuracy" else None
        body.append(_plot(panel, epochs, x, top, reference))
    for mark in svg.ticks(epochs[0].epoch, epochs[-1].epoch, 8):
        if mark == int(mark) and 0 <= x(mark) <= 1:
            body.append(svg.label(f"{mark:g}", svg.across(x(mark)), bottom + 17, "tick middle"))
    body.append(svg.label("epoch", "100%", bottom + 17, "tick", dx=8))
    body.append(_hover(epochs, x, bottom))
    return svg.picture(
        "".join(body),
        identity="history",
        title="Accuracy, loss and cost over the epochs",
        description=f"{len(epochs)} epochs, {len(marks)} prune steps marked; the table below has"
        " the numbers.",
        height=bottom + 24,
        left=50,
        right=58,
    )


def _legend(epochs: Sequence[Epoch], marked: bool) -> str:
    items, dense = [], dense_accuracy(epochs)
    for phase in dict.fromkeys(epoch.phase for epoch in epochs):
        kind = phase if phase in PHASES else "other"
        name = escape(PHASES.get(phase, phase))
        items.append(f'<span><i class="swatch phase {kind}"></i>{name or "training"}</span>')
    if marked:
        items.append('<span><i class="swatch upright step"></i>prune step</span>')
    if dense is not None:
        items.append(
            f'<span><i class="swatch line reference"></i>dense network before pruning, '
            f"{percent(dense)}</span>"
        )
    if (floor := _floor(epochs)) is not None:
        items.append(f"<span>accuracies below {_percent_tick(floor)} are not drawn</span>")
    return f'<p class="legend">{"".join(items)}</p>'


def section(epochs: Sequence[Epoch], steps: Sequence[Step]) -> str:
    """Picture and table of the training; empty without epochs."""
    drawn = chart(epochs, steps) if epochs else ""
    if not drawn:
        return ""
    rows = [
        [
            f"{epoch.epoch:g}",
            escape(PHASES.get(epoch.phase, epoch.phase)),
            plain_number(epoch.loss, 4),
            percent(epoch.accuracy, 2),
            percent(epoch.macs_share),
            plain_number(epoch.lr),
            plain_number(epoch.seconds),
        ]
        for epoch in epochs
    ]
    head = ["epoch", "<phase", "loss", "accuracy", "MACs kept", "learning rate", "seconds"]
    legend = _legend(epochs, bool(prune_epochs(epochs, steps)))
    return legend + drawn + details("All epochs as a table", table(head, rows))
