"""Latency tables: the clock of their times, and where they are kept."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import chain, image
from torch import nn

import psap
from psap import latency, measure, rounding


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is timed; every call takes a millisecond."""
    found: list[Any] = []

    def fastest(call: Any, *_: Any) -> float:
        found.append(call)
        return 1.0

    monkeypatch.setattr(latency, "_fastest", fastest)
    return found


def _graph(width: int) -> psap.Graph:
    return psap.trace(chain(width).float(), image(2, 3, 8, 8).float())


class Waiting(nn.Sequential):
    """Waits before every pass, as it would for a processor that others use."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        return super().forward(x)  # type: ignore[no-any-return]


def test_tables_and_multiples_are_timed_by_the_same_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "SECONDS", 0.0)
    graph = psap.trace(Waiting(*chain(32, 32)).float(), image(2, 3, 8, 8).float())
    assert psap.measure_latency(graph).rest_ms[latency._key(graph)] < 20
    options: dict[str, Any] = {"ratio": 0.5, "candidates": (1,), "repeats": 3}
    assert rounding.fastest(graph, **options, threads=1).times[1].median_ms < 20
    assert rounding.fastest(graph, **options, threads=2).times[1].median_ms >= 20
    assert measure.latency_ms(graph.model, graph.inputs, threads=1).median_ms >= 20


@pytest.mark.parametrize("name", ["none/times.json", "a folder"])
def test_a_table_that_cannot_be_written_is_refused_before_anything_is_timed(
    name: str, tmp_path: Path, timed: list[Any]
) -> None:
    (tmp_path / "a folder").mkdir()
    with pytest.raises(psap.FileError, match=r"none.times.json: No such file|a folder cannot be"):
        psap.measure_latency(_graph(4), tmp_path / name)
    assert timed == []


def test_a_table_that_knows_the_model_may_lie_where_nothing_can_be_written(
    tmp_path: Path, timed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, graph = tmp_path / "times.json", _graph(4)
    table = psap.measure_latency(graph, path)

    def refuse(_: Any) -> None:
        raise psap.FileError("read-only")

    monkeypatch.setattr(latency, "require_writable", refuse)
    assert psap.measure_latency(graph, path) == table
    with pytest.raises(psap.FileError, match="read-only"):
        psap.measure_latency(_graph(5), path)


def test_a_path_that_is_none_is_refused_by_its_type() -> None:
    with pytest.raises(psap.ArgumentTypeError, match="path is a int; pass a str"):
        psap.measure_latency(_graph(4), 3)  # type: ignore[arg-type]
