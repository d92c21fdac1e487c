"""Draws docs/kernels.svg from the committed rows; needs the extra ``psap[report]``."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import rows

OUT = Path(__file__).parents[1] / "docs" / "kernels.svg"
# Placeholders that become CSS variables, so that one file suits light and dark pages.
COLOURS = {
    "ink": ("#010101", "#1b1e23", "#e9e7e2"),
    "muted": ("#020202", "#5a616b", "#a7adb6"),
    "line": ("#030303", "#e5e2dc", "#2d3138"),
    "fused": ("#040404", "#1f62a8", "#64a6ee"),
    "eager": ("#050505", "#cbd8e8", "#2f4560"),
    "limit": ("#060606", "#ad5c00", "#f5a442"),
}
SERIES = {"naive": "naive eager", "tuned": "tuned eager", "fused": "psap, one call"}


def chosen(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The newest float32 row of layer_stats for each network: one CPU thread, contiguous."""
    latest: dict[str, dict[str, Any]] = {}
    for row in found:
        wanted = {"benchmark": "stats", "dtype": "float32", "layout": "contiguous",
                  "device": "cpu", "threads": 1, "backend": "cpu"}  # fmt: skip
        sweep = str(row.get("case")).startswith(("params-", "layers-"))
        if not sweep and all(row.get(key) == value for key, value in wanted.items()):
            latest[row["case"]] = row
    return sorted(latest.values(), key=lambda row: row["bytes"])


def draw(found: list[dict[str, Any]]) -> str:
    """The picture as SVG text: milliseconds per network, the read limit marked.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is nothing to draw.
    """
    if not found:
        raise ValueError("no rows of layer_stats on the CPU: run `python -m benchmarks stats`")
    size = (8, 0.6 + 0.72 * len(found))
    return picture(size, 1, lambda panels: _bars(panels[0], found))


def picture(size: tuple[float, float], columns: int, fill: Callable[[Any], None]) -> str:
    """SVG text of panels side by side, the same for the same input, on light and dark pages.

    Args:
        size: inches.
        columns: number of panels.
        fill: draws into the panels, an array of axes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plot needs matplotlib: pip install 'psap[report]'") from error
    matplotlib.use("svg")
    from matplotlib import pyplot

    settings = {"svg.fonttype": "none", "svg.hashsalt": "psap", "font.family": "sans-serif",
                "font.size": 10, "text.color": COLOURS["ink"][0]}  # fmt: skip
    with matplotlib.rc_context(settings):
        figure, panels = pyplot.subplots(
            1, columns, figsize=size, layout="constrained", squeeze=False
        )
        fill(panels[0])
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
        pyplot.close(figure)
    return _themed(text.getvalue())


def _bars(axes: Any, found: list[dict[str, Any]]) -> None:
    ink, muted, line = (COLOURS[name][0] for name in ("ink", "muted", "line"))
    for at, row in enumerate(found):
        times = {name: row["baselines"][name]["median_ms"] for name in ("naive", "tuned")}
        times["fused"] = row["median_ms"]
        for offset, (name, value) in zip((0.26, 0.0, -0.26), times.items(), strict=True):
            colour = COLOURS["fused" if name == "fused" else "eager"][0]
            axes.barh(at + offset, value, 0.22, color=colour)
            label = f"{value:.3g} ms" if name == "fused" else f"{SERIES[name]}, {value:.3g} ms"
            ratio = row["baselines"]["tuned"]["ratio"]
            label += f", {ratio:.0f}x faster than tuned" if name == "fused" else ""
            axes.annotate(label, (value, at + offset), xytext=(4, 0), textcoords="offset points",
                          va="center", color=ink if name == "fused" else muted,
                          fontsize=8.5)  # fmt: skip
        limit = row["limit"]["median_ms"]
        axes.plot([limit] * 2, [at - 0.4, at - 0.12], color=COLOURS["limit"][0], linewidth=2)
    names = [f"{row['case']}\n{row['bytes'] / 1e6:.3g} MB" for row in found]
    axes.set_yticks(range(len(found)), names, color=ink)
    axes.set_xscale("log")
    axes.set_xlim(right=max(r["baselines"]["naive"]["median_ms"] for r in found) * 5)
    axes.tick_params(axis="x", colors=muted)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=line)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    last = found[-1]
    axes.set_xlabel(
        "milliseconds of one thread, log scale; the mark: reading the bytes once"
        f" ({last['limit']['name']})"
        f"\n{last['cpu']}, {last['kernels']}, torch {last['torch']}, {last['date']}",
        color=muted, fontsize=9)  # fmt: skip
    axes.set_title("layer_stats: every statistic of every layer, weights and gradients",
                   loc="left", fontsize=11, color=ink)  # fmt: skip


def _themed(svg: str) -> str:
    """Placeholders of colours become CSS variables, for light and for dark pages."""
    light = dark = ""
    for name, (placeholder, bright, dim) in COLOURS.items():
        svg = svg.replace(placeholder, f"var(--{name})")
        light, dark = f"{light}--{name}:{bright};", f"{dark}--{name}:{dim};"
    style = f"<style>svg{{{light}}}@media (prefers-color-scheme:dark){{svg{{{dark}}}}}</style>"
    head, start, rest = svg.partition("<defs>")
    return f"{head}{style}{start}{rest}"


def run(folder: Path = rows.RESULTS, out: Path = OUT) -> None:
    """Draw the newest rows of a folder into an SVG file."""
    out.write_text(draw(chosen(rows.read(folder))))
    print(out)
