"""Accuracy over kept MACs: a picture and a table of the committed rows of `benchmarks.accuracy`."""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks import rows
from benchmarks.methods import METHODS
from benchmarks.plot import COLOURS, picture

OUT = Path(__file__).parents[1] / "docs" / "accuracy.svg"
Row = dict[str, Any]
Points = dict[str, list[tuple[float, float, float, int]]]
# Legible on light and dark pages alike.
STYLE = {
    "psap": ("#1f7ae0", "o"),
    "psap-gate": ("#1f7ae0", "s"),
    "psap-uniform": ("#1f7ae0", "^"),
    "l1": ("#d1495b", "o"),
    "l2-global": ("#d1495b", "s"),
    "fpgm": ("#d1495b", "^"),
    "taylor": ("#e08e0b", "o"),
    "slimming": ("#e08e0b", "s"),
    "sfp": ("#8a6fb0", "o"),
    "asfp": ("#8a6fb0", "s"),
    "tp-magnitude": ("#3a9a5b", "o"),
    "tp-magnitude-iterative": ("#3a9a5b", "s"),
    "tp-group-norm": ("#3a9a5b", "^"),
    "random": ("#888888", "x"),
}


def suites(found: list[Row]) -> list[str]:
    """The settings that have rows, in the order of the rows."""
    return list(dict.fromkeys(row["suite"] for row in found))


def means(found: list[Row], suite: str) -> Points:
    """For every method: kept MACs, mean and standard error of the test accuracy in %, runs."""
    grouped: dict[tuple[str, float], list[Row]] = defaultdict(list)
    for row in found:
        if row["suite"] == suite and row.get("test_accuracy") is not None:
            grouped[row["method"], row["keep"]].append(row)
    points: Points = defaultdict(list)
    for (method, _), same in sorted(grouped.items(), key=lambda item: -item[0][1]):
        values = [100 * row["test_accuracy"] for row in same]
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
        share = statistics.mean(row["macs_share"] for row in same)
        points[method].append((share, statistics.mean(values), error, len(values)))
    return {name: points[name] for name in METHODS if name in points}


def table(found: list[Row]) -> str:
    """The means as Markdown: one table per setting, ± the standard error (and the runs)."""
    text = []
    for suite in suites(found):
        keeps = sorted({r["keep"] for r in found if r["suite"] == suite}, reverse=True)
        head = " | ".join(f"{keep:.0%}" for keep in keeps)
        text += [f"**{suite}**", "", f"| kept MACs | {head} |", "|---" * (len(keeps) + 1) + "|"]
        for method in METHODS:
            cells = [_cell(found, suite, method, keep) for keep in keeps]
            if any(cells):
                text.append(f"| {method} | {' | '.join(cells)} |")
        text.append("")
    return "\n".join(text)


def _cell(found: list[Row], suite: str, method: str, keep: float) -> str:
    wanted = {"suite": suite, "method": method, "keep": keep}
    same = [row for row in found if all(row[key] == value for key, value in wanted.items())]
    if any("refused" in row for row in same):
        return "refused"
    points = means(same, suite).get(method)
    return f"{points[0][1]:.1f} ± {points[0][2]:.1f} ({points[0][3]})" if points else ""


def draw(found: list[Row]) -> str:
    """The picture as SVG text: a panel per setting that has several budgets.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is nothing to draw.
    """
    if not found:
        raise ValueError("no rows of accuracy: run `python -m benchmarks accuracy`")
    names = [n for n in suites(found) if any(len(p) > 1 for p in means(found, n).values())]

    def fill(panels: Any) -> None:
        for axes, name in zip(panels, names, strict=True):
            _panel(axes, means(found, name), name)

    return picture((4.6 * len(names), 4.4), len(names), fill)


def _panel(axes: Any, points: Points, name: str) -> None:
    ink, muted, line = (COLOURS[key][0] for key in ("ink", "muted", "line"))
    for method, style in STYLE.items():
        if method not in points:
            continue
        share, mean, error, _ = zip(*points[method], strict=True)
        colour, marker = style
        axes.errorbar(
            [100 * s for s in share], mean, yerr=error, color=colour, marker=marker, markersize=4,
            linewidth=2 if method == "psap" else 0.9, capsize=2, label=method,
        )  # fmt: skip
    for _, mean, _, _ in points.get("dense", []):
        axes.axhline(mean, color=muted, linewidth=0.8, linestyle="--", label="dense")
    axes.set_xscale("log")
    ticks = sorted({round(100 * share) for v in points.values() for share, *_ in v if share < 1})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.tick_params(colors=muted)
    axes.grid(color=line)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("kept MACs, %", color=muted)
    axes.set_title(f"{name}: test accuracy, %", loc="left", fontsize=10, color=ink)
    axes.legend(frameon=False, fontsize=7.5, loc="lower right")


def run(folder: Path = rows.RESULTS, out: Path = OUT) -> None:
    """Draw the rows of a folder into an SVG file, and print them as tables."""
    found = [row for row in rows.read(folder) if row["benchmark"].startswith("accuracy-")]
    out.write_text(draw(found))
    print(table(found))
    print(out)
