"""SVG by hand: x positions are percentages, so pictures fit any width and text keeps its size.

A picture's viewport is its plot area; labels stand outside of it, in the padding of its frame.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from psap.report.text import escape

Point = tuple[float, float]


def _attribute(value: str | float) -> str:
    if isinstance(value, str):
        return escape(value)
    return f"{value:.2f}".rstrip("0").rstrip(".") or "0"


def tag(name: str, content: str = "", **attributes: str | float | None) -> str:
    """An element. ``class_`` is class, ``_`` in a name a hyphen; None leaves an attribute out."""
    parts = [
        f' {key.rstrip("_").replace("_", "-")}="{_attribute(value)}"'
        for key, value in attributes.items()
        if value is not None
    ]
    start = f"<{name}{''.join(parts)}"
    return f"{start}>{content}</{name}>" if content else f"{start}/>"


def across(share: float) -> str:
    """A share of the plot's width."""
    return f"{100 * share:.3f}".rstrip("0").rstrip(".") + "%"


def hint(text: str) -> str:
    """Hover text of the element that it is put into."""
    return f"<title>{escape(text)}</title>"


def label(text: str, x: str | float, y: float, class_: str = "", **more: str | float | None) -> str:
    """Text; escaped."""
    return tag("text", escape(text) or " ", x=x, y=y, class_=class_ or None, **more)


def bar(x: float, width: float, y: float, height: float, class_: str, inner: str = "") -> str:
    """A rectangle; x and width are shares of the plot's width."""
    return tag(
        "rect", inner, x=across(x), width=across(max(width, 0.0)), y=y, height=height, class_=class_
    )


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> str:
    """A straight line; x are shares of the plot's width."""
    return tag("line", x1=across(x1), y1=y1, x2=across(x2), y2=y2, class_=class_)


def curve(points: Sequence[Point | None], top: float, height: float, class_: str) -> str:
    """A line through points (share of the width, of the height from below); None is a gap.

    What lies below the plot is cut off, two pixels lower: a line on the edge keeps its width.
    """
    cut = any(point is not None and point[1] < -1e-9 for point in points)
    room = height + 2 * cut
    runs: list[list[Point]] = [[]]
    for point in points:
        if point is None:
            runs.append([])
        else:
            runs[-1].append(point)
    drawn = []
    for run in runs:
        if len(run) > 1:
            path = " ".join(f"{1000 * x:.1f},{height * (1 - y):.2f}" for x, y in run)
            drawn.append(tag("polyline", points=path, class_=class_))
    if not drawn:
        return ""
    return tag(
        "svg",
        "".join(drawn),
        y=top,
        width="100%",
        height=room,
        viewBox=f"0 0 1000 {_attribute(room)}",
        preserveAspectRatio="none",
        class_=None if cut else "over",
    )


def picture(
    body: str,
    *,
    identity: str,
    title: str,
    description: str,
    height: float,
    left: float = 0,
    right: float = 0,
) -> str:
    """A picture in its frame: ``left`` and ``right`` pixels are for the labels beside the plot."""
    svg = tag(
        "svg",
        named(identity, title, description) + body,
        role="img",
        aria_labelledby=f"{identity}-t {identity}-d",
        width="100%",
        height=height,
        class_="over",
    )
    return f'<div class="plot" style="padding:0 {right:.0f}px 0 {left:.0f}px">{svg}</div>'


def named(identity: str, title: str, description: str) -> str:
    """The title and description of a picture, for those who hear it."""
    return tag("title", escape(title) or " ", id=f"{identity}-t") + tag(
        "desc", escape(description) or " ", id=f"{identity}-d"
    )


def ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers that enclose low and high."""
    span = high - low
    if not math.isfinite(span) or span <= 1e-9 * max(abs(low), abs(high), 1e-290):
        return [low, low + (abs(low) or 1.0)]
    raw = span / wanted
    base = 10.0 ** math.floor(math.log10(raw))
    step = next((base * f for f in (1, 2, 2.5, 5) if base * f >= raw * 0.999), 10 * base)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]
