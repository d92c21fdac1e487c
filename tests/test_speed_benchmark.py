"""Dense against pruned forward passes: whole rows, checked before anything is timed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import psap
from benchmarks import rows, speed
from psap.models import create


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, 2),
            nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> str:
    pytest.importorskip("onnxruntime", reason="needs the extra psap[onnx]")
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return "test_speed_benchmark:Tiny"


def test_rows_of_every_way(network: str, tmp_path: Path) -> None:
    speed.run(networks=(network,), keeps=(0.5,), batches=(2,), repeats=2, out=tmp_path)
    assert rows.faults(tmp_path) == []
    found = [json.loads(line) for line in (tmp_path / "speed.jsonl").read_text().splitlines()]
    timed = [(row["backend"], row["way"]) for row in found if "refused" not in row]
    for runtime in ("pytorch", "onnxruntime"):
        assert {"plain", "round-8", "measured"} <= {way for run, way in timed if run == runtime}
    for row in found:
        if "refused" in row:
            assert row["way"] == "latency"
            continue
        dense = row["baselines"]["dense"]
        assert dense["ratio"] == pytest.approx(dense["median_ms"] / row["median_ms"])
        assert row["relative_error"] <= 1e-9 and row["weights"] == "random"
        if row["way"] != "latency":
            assert row["macs_share"] <= 0.5
        if row["way"] == "round-8":
            assert row["widths"] and all(width % 8 == 0 for width in row["widths"])


def test_a_target_that_cannot_be_met_is_a_row_that_says_so(
    network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(graph: Any) -> Any:
        raise psap.TargetError("cannot be met")

    monkeypatch.setattr(psap, "measure_latency", refuse)
    found = speed.compare(network, 0.5, 1, ways=("latency", "plain"), repeats=2)
    assert [("refused" in row, row["way"]) for row in found] == [
        (True, "latency"), (False, "plain"), (False, "plain"),
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"ways are \['fast'\]; pass some of plain, round-8"):
        speed.run(ways=("fast",))


def test_widths_in_blocks_of_16() -> None:
    graph = psap.trace(create("resnet20").eval(), torch.randn(1, 3, 32, 32))
    chosen = speed.plan(graph, 0.8, "round-16")
    fewer = [len(group.kept) for group in chosen.groups if len(group.kept) < group.size]
    assert fewer and all(width % 16 == 0 for width in fewer)


def test_a_network_that_was_trained(network: str, tmp_path: Path) -> None:
    model, x = create("resnet20").eval(), torch.randn(2, 3, 32, 32)
    first = psap.drop_blocks(model, x, blocks=["layer1.1", "layer3.1"])
    small = psap.apply(first.model, psap.plan(psap.trace(first.model, x), ratio=0.5))
    file = tmp_path / "small.safetensors"
    psap.save(small, file)
    speed.run(networks=("resnet20",), files=(file,), batches=(2,), repeats=2, out=tmp_path)
    found = [json.loads(line) for line in (tmp_path / "speed.jsonl").read_text().splitlines()]
    assert [row["backend"] for row in found] == ["pytorch", "onnxruntime"]
    share = small.plan.after.macs / first.plan.before.macs
    assert all(row["macs_share"] == pytest.approx(share) for row in found)
    assert all((row["way"], row["weights"]) == ("small", "trained") for row in found)
    assert rows.faults(tmp_path) == []
