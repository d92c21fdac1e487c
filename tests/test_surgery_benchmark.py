"""The benchmark of trace, plan and apply: rows of chains, here and in a process of their own."""

from __future__ import annotations

import json
from typing import Any

import pytest

import psap
from benchmarks import rows, surgery


def test_a_chain_gives_a_whole_row(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def alone(*options: int) -> dict[str, Any]:
        asked.append(options)
        return surgery.deep(*options)

    monkeypatch.setattr(surgery, "_alone", alone)
    monkeypatch.setattr(surgery, "WIDTH", 8)
    surgery.run(models=(), layers=(4,), repeats=2, out=tmp_path)
    assert asked == [(4, 8, 3, 2)]
    assert rows.faults(tmp_path) == []
    (row,) = (json.loads(line) for line in (tmp_path / "surgery.jsonl").read_text().splitlines())
    assert row["groups"] == 4 and row["budget_search_ms"] > 0
    assert row["median_ms"] == pytest.approx(row["plan_ms"] + row["apply_ms"], rel=0.5)
    with pytest.raises(ValueError, match="repeats is 1; pass at least 2"):
        surgery.run(models=(), repeats=1)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_memory_stays_below_both_networks_and_a_third() -> None:
    row = surgery._alone(6, 2048, 1, 2)
    assert row["peak_over_both_networks"] < 1.3


def test_a_network_that_differs_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = surgery.chain(2, 8, 1)
    monkeypatch.setattr(surgery.coverage.models, "build", lambda *_: (model, inputs))
    result = psap.apply(model, psap.plan(psap.trace(model, inputs), ratio=0.5))
    result.report["verification"]["max_relative_error"] = 1e-6
    monkeypatch.setattr(psap, "apply", lambda *_, **__: result)
    with pytest.raises(surgery.registry.CheckFailed, match="chain: the small network differs by"):
        surgery.compared("chain", 0, 2)
