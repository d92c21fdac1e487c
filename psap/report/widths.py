"""Pictures of the widths: the silhouette of the whole network, and one row per layer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from psap.report import svg
from psap.report.record import Layer
from psap.report.text import DASH, count, details, escape, percent, ratio, shorten, table

_SHOWN = 22  # characters of a layer's name beside its row
_MANY = 16  # layers from which on rows are headed by stage
_SCROLL = 80  # rows from which on the picture scrolls


def _width(value: int | None) -> str:
    return DASH if value is None else str(value)


def _change(layer: Layer) -> str:
    before, after = layer.before[0], layer.after[0]
    if before == after:
        return _width(after)
    return f"{_width(before)} → {_width(after)}"


def silhouette(layers: Sequence[Layer]) -> str:
    """The network from input to output: each layer as high as it is wide, dense behind small."""
    most = max((layer.before[0] or 0 for layer in layers), default=0)
    if most == 0:
        return ""
    height, slot = 132.0, 1 / len(layers)
    gap = slot * (0.18 if len(layers) <= 100 else 0.0)
    body = []
    for i, layer in enumerate(layers):
        bars = []
        for width, class_ in ((layer.before[0], "before"), (layer.after[0], "kept")):
            size = height * (width or 0) / most
            bars.append(svg.bar(i * slot + gap / 2, slot - gap, (height - size) / 2, size, class_))
        body.append(svg.tag("g", "".join(bars) + svg.hint(f"{layer.name}\n{_change(layer)}")))
    picture = svg.picture(
        "".join(body),
        identity="silhouette",
        title="Silhouette of the network",
        description=f"{len(layers)} layers from input to output, each as high as it is wide: the"
        " dense network pale, the small one in front of it.",
        height=height,
    )
    caption = (
        "<figcaption><span>input</span><span>every layer, as high as it is wide:"
        ' <i class="swatch before"></i>dense <i class="swatch kept"></i>small</span>'
        "<span>output</span></figcaption>"
    )
    return f'<figure class="silhouette">{picture}{caption}</figure>'


def stages(names: Sequence[str]) -> list[str] | None:
    """The stage of each name (its first one or two components) if that makes a useful grouping."""
    if len(names) <= _MANY:
        return None
    for depth in (1, 2):
        keys = [".".join(name.split(".")[:-1][:depth]) for name in names]
        runs = 1 + sum(a != b for a, b in pairwise(keys))
        if 2 <= runs <= len(names) / 2:
            return keys
    return None


def _row(layer: Layer, shown: str, most: int, y: float, height: float) -> str:
    before, after = layer.before[0] or 0, layer.after[0] or 0
    middle = y + height / 2
    bars = svg.bar(0, before / most, y, height, "before") + svg.bar(
        0, after / most, y, height, "kept"
    )
    same = layer.before[0] == layer.after[0]
    text = svg.label(shorten(shown, _SHOWN), -10, middle, "name end mid")
    text += svg.label(_change(layer), "100%", middle, "mid faint" if same else "mid", dx=10)
    into = f"inputs {_width(layer.before[1])} → {_width(layer.after[1])}"
    kept = percent(ratio(layer.macs_after, layer.macs_before))
    hint = f"{layer.name} ({layer.kind})\nwidth {_change(layer)}\n{into}\nMACs kept {kept}"
    return svg.tag("g", bars + text + svg.hint(hint), class_="row")


def bars(layers: Sequence[Layer]) -> str:
    """One row per layer: width before (pale) and after (solid)."""
    most = max((layer.before[0] or 0 for layer in layers), default=0) or 1
    keys = stages([layer.name for layer in layers])
    height, pitch = (13.0, 21.0) if len(layers) <= 32 else (10.0, 15.0)
    body, y, shown_names, last = [], 4.0, [], None
    for i, layer in enumerate(layers):
        shown = layer.name
        if keys is not None:
            if keys[i] != last:
                first, last = last is None, keys[i]
                y += (0.0 if first else 8.0) + (18.0 if last else 0.0)
                if last:
                    body.append(svg.label(shorten(last, 40), "0", y - 8, "head"))
                if last or not first:
                    body.append(svg.line(0, y - 3, 1, y - 3, "grid"))
            shown = layer.name[len(keys[i]) :].lstrip(".") or layer.name
        shown_names.append(len(shorten(shown, _SHOWN)))
        body.append(_row(layer, shown, most, y, height))
        y += pitch
    picture = svg.picture(
        "".join(body),
        identity="widths",
        title="Width of each layer before and after",
        description=f"{len(layers)} layers, at most {most} channels; numbers in the table below.",
        height=y + 2,
        left=18 + 7.0 * max(shown_names, default=0),
        right=22 + 6.8 * max((len(_change(layer)) for layer in layers), default=0),
    )
    return f'<div class="tall">{picture}</div>' if len(layers) > _SCROLL else picture


def _layer_table(layers: Sequence[Layer]) -> str:
    head = ["layer", "<kind", "out", "in", "MACs", "small", "parameters", "small"]
    rows = [
        [
            f"<code>{escape(layer.name)}</code>",
            escape(layer.kind) or DASH,
            escape(_change(layer)),
            f"{_width(layer.before[1])} → {_width(layer.after[1])}",
            count(layer.macs_before),
            count(layer.macs_after),
            count(layer.parameters_before),
            count(layer.parameters_after),
        ]
        for layer in layers
    ]
    return details("All layers as a table", table(head, rows))


def section(layers: Sequence[Layer]) -> str:
    """Picture and table of the widths."""
    legend = (
        '<p class="legend"><span><i class="swatch before"></i>dense</span>'
        '<span><i class="swatch kept"></i>small</span></p>'
    )
    return legend + bars(layers) + _layer_table(layers)
