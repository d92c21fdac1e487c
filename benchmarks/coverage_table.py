"""Writes docs/coverage.md from the rows of the coverage benchmark."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks import rows

OUT = Path(__file__).parents[1] / "docs" / "coverage.md"
Row = dict[str, Any]
Table = dict[tuple[str, str], Row]

INTRO = """# Which models psap prunes

Every model loses half of the channels of everything that can be pruned, in a process of its own,
one thread, random weights and norms, at the size that it is made for, or at the one that is
named; detectors see two small images. `python -m benchmarks coverage` makes the rows,
`python -m benchmarks coverage-table` this page.

* **exact**: the small network equals the masked one to 1e-9 (relative, float64, compared apart
  from psap's own proof), and a forward pass and a training step run afterwards. **broken** would
  be that they do not, **wrong** a difference; **refused** is an error with a reason, and an
  untouched model.
* **mode**: *module*, the user's modules with smaller tensors; *graph*, programs where widths are
  fixed in Python or a norm counts channels; *gated*, that a program could not be made, so that
  `trace(..., gated=True)` pruned only what the user's own modules can lose.
* **kept**: parameters that are left. Times are CPU seconds, of one call each: of a forward pass,
  of `trace`, and of `plan` and `apply` without the proof, which has a column of its own.
* **Torch-Pruning**: version 1.6.1 on the same model and inputs, told to leave the classifiers
  alone. *runs* says that a forward pass and a training step run afterwards; whether the result
  computes what it should is not known, since it removes channels from layer norms as well, which
  changes their statistics. Its time is that of building the pruner and of `step()`. Where nothing
  stands, it was not measured.
* **kirigami**: torch-kirigami 0.2.1, likewise, told to remove half of the filters of every layer
  that it can follow. Its time is that of building its graph, and of planning and applying;
  *timeout* is more than 40 s of CPU time.
"""


def run(source: Path = rows.RESULTS / "coverage.jsonl", *, out: Path = OUT) -> None:
    """Write the table.

    Args:
        source: rows of the coverage benchmark.
        out: the page.
    """
    table: Table = {}
    for line in source.read_text().splitlines():
        row = json.loads(line)
        table[row["model"], row["library"]] = row
    names = list(dict.fromkeys(name for name, _ in table))
    ours = {name: table[name, "psap"] for name in names if (name, "psap") in table}
    theirs = {n: table[n, "torch-pruning"] for n in names if (n, "torch-pruning") in table}
    kirigami = {n: table[n, "torch-kirigami"] for n in names if (n, "torch-kirigami") in table}
    parts = [
        INTRO,
        _summary(ours, theirs, kirigami),
        _lines(ours, theirs, kirigami),
        _reasons(ours),
    ]
    out.write_text("\n".join(part for part in parts if part) + "\n")
    print(f"{out}: {len(ours)} models")


def _summary(ours: dict[str, Row], theirs: dict[str, Row], kirigami: dict[str, Row]) -> str:
    lines = []
    for library in ("torchvision", "timm"):
        found = [
            f"{name} {_counts({n: r for n, r in rows.items() if n.startswith(library)})}"
            for name, rows in (("psap", ours), ("Torch-Pruning", theirs), ("kirigami", kirigami))
        ]
        lines.append(f"* {library}: {'; '.join(found)}.")
    both = [n for n in ours if _kept(ours[n]) and theirs.get(n, {}).get("result") == "runs"]
    more = [
        n + _why(ours[n], theirs[n])
        for n in both
        if ours[n]["kept_parameters"] > theirs[n]["kept_parameters"] + 5e-4
    ]
    late = [n for n in both if _step(ours[n]) > _step(theirs[n])]
    slow = [n for n, r in ours.items() if "trace_s" in r and r["trace_s"] > _allowed(r)]
    lines.append(
        f"* Of {len(both)} models that both handle, psap keeps more parameters of {len(more)}"
        + (f": {', '.join(more)}." if more else ".")
    )
    lines.append(
        f"* `plan` and `apply` without a proof take longer than its pruner on {len(late)} of these"
        + (f": {', '.join(late)}." if late else ".")
    )
    lines.append(
        f"* `trace` takes longer than three forward passes and than 0.2 s on {len(slow)} models"
        + (f": {', '.join(slow)}." if slow else ".")
    )
    return "\n".join(lines) + "\n"


def _why(own: Row, peer: Row) -> str:
    """What of a peer's smaller network is no better choice of the half that both were asked for."""
    notes = []
    layer, before, after = peer.get("narrowest", ("", 2, 1))
    if after < 0.4 * before:
        notes.append(
            f"where it leaves {after} of {before} filters of {layer}, though asked for half"
        )
    if set(own["left_alone"].values()) == {"output of the model"}:
        notes.append("psap leaves half of every layer but that of the output")
    return f" ({'; '.join(notes)})" if notes else ""


def _step(row: Row) -> float:
    """Seconds of making the small network: plan and apply, or building a pruner and its step."""
    first = row["plan_s"] if "plan_s" in row else row["trace_s"]
    return float(first) + float(row["apply_s"])


def _counts(found: dict[str, Row]) -> str:
    counts = Counter(row["result"] for row in found.values())
    return f"{len(found)} models, " + ", ".join(f"{n} {name}" for name, n in counts.most_common())


def _kept(row: Row) -> bool:
    return row["result"] == "exact"


def _allowed(row: Row) -> float:
    return max(3 * float(row["forward_s"]), 0.2)


def _lines(ours: dict[str, Row], theirs: dict[str, Row], kirigami: dict[str, Row]) -> str:
    lines = [
        "| model | result | mode | groups | kept | error | forward s | trace s | plan, apply s "
        "| proof s | Torch-Pruning | kept | s | kirigami | kept | s |",
        "|" + "---|" * 16,
    ]
    for name, row in ours.items():
        mode = f"{row.get('mode', '')}{', gated' if row.get('gated') else ''}"
        mode += f", {row['size']} px" if row.get("size") else ""
        cells = [
            name, row["result"], mode, str(row.get("groups", "")), _percent(row),
            f"{row['error']:.0e}" if "error" in row else "", _seconds(row.get("forward_s")),
            _seconds(row.get("trace_s")), _total(row), _seconds(row.get("proof_s")),
        ]  # fmt: skip
        for peer in (theirs.get(name, {}), kirigami.get(name, {})):
            cells += [peer.get("result", ""), _percent(peer), _total(peer)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _percent(row: Row) -> str:
    return f"{100 * row['kept_parameters']:.1f} %" if "kept_parameters" in row else ""


def _total(row: Row) -> str:
    return _seconds(_step(row)) if "apply_s" in row else ""


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _reasons(ours: dict[str, Row]) -> str:
    """Why a model is not exact, or could only be pruned where its own modules allow it."""
    lines = []
    for name, row in ours.items():
        why = row.get("reason") if row["result"] != "exact" else row.get("ungated")
        if why:
            lines.append(f"* {name}: {str(why).splitlines()[0][:400]}")
    return "\n".join(["## Reasons", "", *lines]) if lines else ""
