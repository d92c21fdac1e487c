"""The page that is written from the rows of the coverage benchmark."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import coverage_table

OURS = {
    "library": "psap", "result": "exact", "mode": "graph", "gated": False, "groups": 3,
    "kept_parameters": 0.3, "error": 2e-16, "forward_s": 0.1, "trace_s": 0.25, "plan_s": 0.05,
    "apply_s": 0.1, "proof_s": 1.0, "left_alone": {"head": "output of the model"},
}  # fmt: skip
THEIRS = {
    "library": "torch-pruning", "result": "runs", "kept_parameters": 0.28, "forward_s": 0.1,
    "trace_s": 0.2, "apply_s": 0.5, "narrowest": ["layer.0", 64, 2],
}  # fmt: skip
OTHERS = {
    "library": "torch-kirigami", "result": "runs", "kept_parameters": 0.4, "forward_s": 0.1,
    "trace_s": 0.01, "apply_s": 0.03, "narrowest": ["layer.0", 64, 32],
}  # fmt: skip


def test_the_table_says_what_is_worse_and_why(tmp_path: Path) -> None:
    rows = [
        {"model": "timm/a", **OURS},
        {"model": "timm/a", **THEIRS},
        {"model": "timm/a", **OTHERS},
        {"model": "timm/b", **OURS, "trace_s": 0.31, "gated": True, "ungated": "a fixed size"},
        {"model": "timm/b", **THEIRS, "result": "crash", "reason": "KeyError"},
        {"model": "timm/c", "library": "psap", "result": "refused", "reason": "E: no\nmore"},
        {"model": "timm/d", **OURS, "kept_parameters": 0.28},
        {"model": "timm/d", **THEIRS, "apply_s": -0.1},
        {
            "model": "timm/e",
            **OURS,
            "left_alone": {"a": "no rule for aten.b", "c": "output of the model"},
        },
        {"model": "timm/e", **THEIRS, "narrowest": ["layer.0", 64, 32]},
    ]
    source = tmp_path / "coverage.jsonl"
    source.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    out = tmp_path / "coverage.md"
    coverage_table.run(source, out=out)
    text = out.read_text()
    assert "* timm: psap 5 models, 4 exact, 1 refused; Torch-Pruning 4 models, 3 runs, 1" in text
    assert "crash; kirigami 1 models, 1 runs." in text
    assert (
        "Of 3 models that both handle, psap keeps more parameters of 2: timm/a (where it leaves "
        "2 of 64 filters of layer.0, though asked for half; psap leaves half of every layer but "
        "that of the output), timm/e." in text
    )
    assert "take longer than its pruner on 1 of these: timm/d." in text
    assert "on 1 models: timm/b." in text
    assert "| timm/a | exact | graph | 3 | 30.0 % | 2e-16 | 0.10 | 0.25 | 0.15 | 1.00 |" in text
    assert "| runs | 28.0 % | 0.70 | runs | 40.0 % | 0.04 |" in text
    assert "| timm/c | refused |" + "  |" * 14 in text
    assert text.endswith("## Reasons\n\n* timm/b: a fixed size\n* timm/c: E: no\n")
