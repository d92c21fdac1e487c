"""The page that is written from the rows of the coverage benchmark."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import coverage_table

OURS = {
    "library": "psap", "result": "exact", "mode": "graph", "gated": False, "groups": 3,
    "kept_parameters": 0.3, "error": 2e-16, "forward_s": 0.1, "trace_s": 0.25, "plan_s": 0.05,
    "apply_s": 0.1, "proof_s": 1.0,
}  # fmt: skip
THEIRS = {
    "library": "torch-pruning", "result": "runs", "kept_parameters": 0.28, "forward_s": 0.1,
    "trace_s": 0.2, "apply_s": 0.5,
}  # fmt: skip


def test_the_table_says_what_is_worse_and_why(tmp_path: Path) -> None:
    rows = [
        {"model": "timm/a", **OURS},
        {"model": "timm/a", **THEIRS},
        {"model": "timm/b", **OURS, "trace_s": 0.31, "gated": True, "ungated": "a fixed size"},
        {"model": "timm/b", **THEIRS, "result": "crash", "reason": "KeyError"},
        {"model": "timm/c", "library": "psap", "result": "refused", "reason": "E: no\nmore"},
    ]
    source = tmp_path / "coverage.jsonl"
    source.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    out = tmp_path / "coverage.md"
    coverage_table.run(source, out=out)
    text = out.read_text()
    assert "* timm: psap 3 models, 2 exact, 1 refused; Torch-Pruning 2 models, 1 runs, 1" in text
    assert "Of 1 models that both handle, psap keeps more parameters of 1: timm/a." in text
    assert "on 1 models: timm/b." in text
    assert "| timm/a | exact | graph | 3 | 30.0 % | 2e-16 | 0.10 | 0.25 | 0.15 | 1.00 |" in text
    assert "| runs | 28.0 % | 0.70 |" in text
    assert "| timm/c | refused |  |  |  |  |  |  |  |  |  |  |  |" in text
    assert text.endswith("## Reasons\n\n* timm/b: a fixed size\n* timm/c: E: no\n")
