"""Dense against small: the big figures of the head, the table, the picture of latencies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from psap.report import svg
from psap.report.reading import number
from psap.report.record import Latency, Layer, Record
from psap.report.text import (
    DASH,
    count,
    escape,
    milliseconds,
    percent,
    ratio,
    scientific,
    short_count,
    signed,
    table,
    times,
)


@dataclass(frozen=True, kw_only=True)
class Totals:
    """A quantity of the dense and of the small network."""

    dense: float | None
    small: float | None

    @property
    def share(self) -> float | None:
        """What the small network has of it."""
        return ratio(self.small, self.dense)

    @property
    def factor(self) -> float | None:
        """How many times smaller it became."""
        return ratio(self.dense, self.small)


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


def macs(record: Record) -> Totals:
    """MACs as compared, or the sum over the layers."""
    layers: Sequence[Layer] = record.layers
    dense, small = record.dense.macs, record.small.macs
    if dense is None or small is None:
        dense = _sum([layer.macs_before for layer in layers])
        small = _sum([layer.macs_after for layer in layers])
    return Totals(dense=dense, small=small)


def parameters(record: Record) -> Totals:
    """Parameters as compared, or the sum over the layers."""
    layers: Sequence[Layer] = record.layers
    dense, small = record.dense.parameters, record.small.parameters
    if dense is None or small is None:
        dense = _sum([layer.parameters_before for layer in layers])
        small = _sum([layer.parameters_after for layer in layers])
    return Totals(dense=dense, small=small)


def _medians(dense: Latency | None, small: Latency | None) -> Totals:
    return Totals(
        dense=None if dense is None else dense.median,
        small=None if small is None else small.median,
    )


def points(record: Record) -> str:
    """Accuracy lost or won, in points."""
    dense, small = record.dense.accuracy, record.small.accuracy
    if dense is None or small is None:
        return ""
    return f"{signed(100 * (small - dense))} points"


def _tile(name: str, figure: str, note: str, share: float | None = None) -> str:
    meter = ""
    if share is not None:
        width = min(max(100 * share, 0.0), 100.0)
        meter = f'<div class="meter"><i style="width:{width:.1f}%"></i></div>'
    return (
        f'<div class="tile"><dt>{name}</dt><dd><strong>{figure}</strong>{meter}'
        f"<small>{note}</small></dd></div>"
    )


def _speed(totals: Totals) -> tuple[str, str]:
    factor = totals.factor
    if factor is None:
        return DASH, ""
    if factor >= 1:
        return times(factor), "faster"
    return times(ratio(1.0, factor)), "slower"


def tiles(record: Record) -> str:
    """The row of big figures; a figure that was not measured has no tile."""
    dense, small, found = record.dense, record.small, []
    if small.accuracy is not None:
        change = points(record)
        note = f"dense {percent(dense.accuracy)}, {change}" if change else ""
        found.append(_tile("Accuracy", percent(small.accuracy), note))
    for name, totals in (("MACs kept", macs(record)), ("Parameters kept", parameters(record))):
        if totals.share is not None:
            note = f"{short_count(totals.dense)} → {short_count(totals.small)}"
            found.append(_tile(name, percent(totals.share), note, totals.share))
    latency = _medians(dense.latency, small.latency)
    if latency.factor is not None:
        figure, word = _speed(latency)
        note = f"{word}: {milliseconds(latency.dense)} → {milliseconds(latency.small)}"
        found.append(_tile("Latency", figure, note))
    if small.file_bytes is not None:
        size = Totals(dense=dense.file_bytes, small=small.file_bytes)
        note = f"dense {short_count(size.dense, 'B')}" if size.dense is not None else ""
        found.append(_tile("File", short_count(size.small, "B"), note, size.share))
    if "max_relative_error" in record.verification:
        error, kind = _error(record), escape(record.verification.get("dtype") or "")
        note = f"small against masked dense{', ' + kind if kind else ''}"
        found.append(_tile("Relative error", scientific(error), note))
    return f'<dl class="tiles">{"".join(found)}</dl>' if found else ""


def _error(record: Record) -> float | None:
    return number(record.verification.get("max_relative_error"))


def _spread(latency: Latency | None) -> str:
    if latency is None:
        return DASH
    median = milliseconds(latency.median)
    if latency.p20 is None or latency.p80 is None:
        return median
    spread = f"{milliseconds(latency.p20, '')}{DASH}{milliseconds(latency.p80, '')}"
    return f'{median} <span class="faint">({spread})</span>'


def _size_row(name: str, totals: Totals, show: str) -> list[str]:
    texts = [count(totals.dense), count(totals.small)]
    if show == "B":
        texts = [short_count(totals.dense, "B"), short_count(totals.small, "B")]
    return [name, *texts, percent(totals.share), times(totals.factor)]


def comparison(record: Record) -> str:
    """Table of everything measured; empty if nothing was."""
    dense, small, rows = record.dense, record.small, []
    if dense.accuracy is not None or small.accuracy is not None:
        pair = [percent(dense.accuracy, 2), percent(small.accuracy, 2)]
        rows.append(["Accuracy", *pair, "", points(record) or DASH])
    if record.began_accuracy is not None:
        began = percent(record.began_accuracy, 2)
        rows.append(["Accuracy when pruning began", began, "", "", ""])
    size = Totals(dense=dense.file_bytes, small=small.file_bytes)
    for name, totals, unit in (
        ("MACs per input", macs(record), ""),
        ("Parameters", parameters(record), ""),
        ("File", size, "B"),
    ):
        if totals.dense is not None or totals.small is not None:
            rows.append(_size_row(name, totals, unit))
    for name, a, b in (
        ("Latency, PyTorch", dense.latency, small.latency),
        ("Latency, ONNX Runtime", dense.onnx_latency, small.onnx_latency),
    ):
        if a is not None or b is not None:
            totals = _medians(a, b)
            figure, word = _speed(totals)
            row = [name, _spread(a), _spread(b), percent(totals.share), f"{figure} {word}".strip()]
            rows.append(row)
    if not rows:
        return ""
    return table(["", "dense", "small", "kept", "change"], rows) + _conditions(record)


def _conditions(record: Record) -> str:
    parts = []
    if any(s.latency or s.onnx_latency for s in (record.dense, record.small)):
        text = "Latency is the median, with the 20th to 80th percentile"
        if record.batch is not None:
            text += f", of a batch of {record.batch}"
        if record.threads is not None:
            text += f" on {record.threads} thread{'s' * (record.threads != 1)}"
        parts.append(f"{text}.")
    if record.onnx_difference is not None:
        difference = scientific(record.onnx_difference)
        parts.append(f"ONNX Runtime differs from PyTorch by at most {difference}.")
    return f'<p class="note">{" ".join(parts)}</p>' if parts else ""


def latencies(record: Record) -> str:
    """Median and spread of each measured latency on one axis; empty if fewer than two."""
    entries = [
        (f"{runtime} {network}", network, latency)
        for runtime, pair in (
            ("PyTorch", (record.dense.latency, record.small.latency)),
            ("ONNX Runtime", (record.dense.onnx_latency, record.small.onnx_latency)),
        )
        for network, latency in zip(("dense", "small"), pair, strict=True)
        if latency is not None and latency.median is not None and latency.median >= 0
    ]
    if len(entries) < 2:
        return ""
    marks = svg.ticks(0.0, max(max(e.median or 0, e.p80 or 0) for _, _, e in entries), 4)
    high, pitch = marks[-1], 26.0
    bottom, body = pitch * len(entries) + 4, []
    for mark in marks:
        body.append(svg.line(mark / high, 0, mark / high, bottom, "grid"))
        body.append(svg.label(f"{mark:g}", svg.across(mark / high), bottom + 16, "tick middle"))
    body.append(svg.label("ms", "100%", bottom + 16, "tick", dx=16))
    for i, (name, network, latency) in enumerate(entries):
        y, median = pitch * i + 14, latency.median or 0.0
        kind = "kept" if network == "small" else "before"
        body.append(svg.bar(0, median / high, y - 6, 12, kind))
        if latency.p20 is not None and latency.p80 is not None:
            low, top = sorted((max(latency.p20, 0) / high, max(latency.p80, 0) / high))
            body.append(svg.line(low, y, top, y, "whisker"))
            body += [svg.line(x, y - 4, x, y + 4, "whisker") for x in (low, top)]
        body.append(svg.label(name, -10, y, "end mid"))
        hint = f"{name}\nmedian {milliseconds(latency.median)}\np20 {milliseconds(latency.p20)}"
        hint += f"\np80 {milliseconds(latency.p80)}"
        body.append(svg.bar(0, 1, y - 12, 24, "hover", svg.hint(hint)))
    return svg.picture(
        "".join(body),
        identity="latency",
        title="Measured latency",
        description="Medians as bars, 20th to 80th percentile as whiskers; numbers in the table.",
        height=bottom + 22,
        left=140 if any(name.startswith("ONNX") for name, _, _ in entries) else 100,
        right=36,
    )
