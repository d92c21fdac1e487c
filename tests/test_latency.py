"""Measured latency: layers, tables, files that mean harm, budgets, and the fastest multiple."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets import chain, image, randomise, train_step
from torch import nn
from zoo import CASES

import psap
from psap import cli, latency, measure, rounding
from psap.cost import Budget, CostModel
from psap.latency import Curve, LatencyTable
from psap.layers import layers


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """As few passes as possible: what is tested is not the clock."""
    monkeypatch.setattr(latency, "SECONDS", 0.0)
    monkeypatch.setattr(latency, "PASSES", 1)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, quick: None) -> list[tuple[int, ...]]:
    """A clock on which a layer takes a microsecond for each thousand multiply-accumulates."""
    called = []

    def stopwatch(*_: Any, **__: Any) -> Any:
        def once(call: Any, inputs: Any, device: Any) -> float:
            out = call(*inputs)
            called.append(tuple(out.shape))
            return float(out[0].numel() * inputs[0].shape[1]) / 1e6

        return once

    monkeypatch.setattr(measure, "stopwatch", stopwatch)
    monkeypatch.setattr(latency, "_rest", lambda *_: 0.25)
    return called


def _graph(*widths: int) -> psap.Graph:
    return psap.trace(randomise(chain(*widths)).float(), image(2, 3, 8, 8).float())


# Layers


@pytest.mark.parametrize("name", CASES)
def test_every_layer_is_called_again_at_its_own_size(name: str) -> None:
    case = CASES[name]
    model = randomise(case.make())
    graph = psap.trace(model, case.inputs)
    found = layers(graph)
    seen: list[torch.Size] = []
    for layer in found:
        call, inputs = layer.call(layer.weight_shape[:2], torch.device("cpu"))  # type: ignore[arg-type]
        out = call(*inputs)
        seen.append(out.shape)
        assert out.dtype == layer.dtype == torch.float64
        first, second = layer.knots(latency.SHARES)
        assert (first[-1], second[-1]) == layer.weight_shape[:2]
        for sizes in ((first[0], second[0]), (first[len(first) // 2], second[-1])):
            layer.call(sizes, torch.device("cpu"))[0](*layer.call(sizes, torch.device("cpu"))[1])
    called = {call.weight for call in graph.calls if call.positions}
    assert {layer.weight for layer in found} >= called
    outputs = sum(shape.numel() for shape in seen)
    if {layer.weight for layer in found} == called and name != "raw parameter":
        assert outputs == sum(call.outputs for call in graph.calls)


def test_a_signature_tells_what_takes_time() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, bias=False),
        nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(8 * 36, 8 * 36), nn.Linear(8 * 36, 5),
    )  # fmt: skip
    found = [x.signature() for x in layers(psap.trace(net, torch.randn(2, 3, 16, 16)))]
    assert len(found) == len(set(found)) == 7  # sizes of the pictures differ, too
    assert found[1] == (
        "convolution (8,8,3,3) (2,14,14) (1,1) (0,0) (1,1) False (0,0) 1 float32 bias"
    )
    assert found[-1] == "linear (5,288) (2,) float32 bias"


# The table


def test_measured_once_and_kept(tmp_path: Path, clock: list[Any]) -> None:
    path, graph = tmp_path / "times.json", _graph(8, 6)
    table = psap.measure_latency(graph, path)
    timed = len(clock)
    assert len(table.curves) == 3 and timed > 0
    again = psap.measure_latency(graph, path)
    assert len(clock) == timed and again == table == latency.read(path)
    psap.measure_latency(_graph(8, 7), path)  # two layers are new, the first is known
    known = latency.read(path)
    assert len(known.curves) == 5 and len(known.rest_ms) == 2
    assert psap.measure_latency(graph, None).curves == table.curves


def test_what_was_timed_is_kept_if_the_rest_fails(
    tmp_path: Path, clock: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> float:
        raise KeyboardInterrupt("injected")

    monkeypatch.setattr(latency, "_rest", fail)
    path, threads = tmp_path / "times.json", torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt, match="injected"):
        psap.measure_latency(_graph(8, 6), path, threads=threads + 1)
    assert len(latency.read(path).curves) == 3
    assert torch.get_num_threads() == threads
    assert list(tmp_path.iterdir()) == [path]


def test_a_table_of_another_machine(tmp_path: Path, clock: list[Any]) -> None:
    path, graph = tmp_path / "times.json", _graph(8, 6)
    psap.measure_latency(graph, path, threads=1)
    with pytest.raises(
        psap.FileError, match=r"was measured with .* threads 1, this is .*threads 2"
    ):
        psap.measure_latency(graph, path, threads=2)
    body = json.loads(path.read_text())
    body["machine"]["torch"] = "1.0"
    path.write_text(json.dumps(body))
    with pytest.raises(psap.FileError, match=r"torch 1\.0, .* do not carry over: pass another"):
        psap.measure_latency(graph, path)


GOOD = {
    "format": "psap-latency",
    "version": 1,
    "machine": {"processor": "p", "torch": "t", "threads": 1},
    "layers": {"a": {"knots": [[1, 2], [4]], "ms": [[0.5], [1]]}},
    "rest_ms": {"m": 0.0},
}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format": "psap-plan"}, "is no latency table; pass a file"),
        ({"version": 2}, "has format version 2, this psap reads 1"),
        ({"version": None}, "has format version None"),
        ({"machine": {}}, "is damaged .KeyError: 'processor'"),
        ({"machine": 3}, "is damaged"),
        ({"layers": 3}, "is damaged"),
        ({"layers": {"a": {"knots": [[1, 2], [4]]}}}, "is damaged .KeyError: 'ms'"),
        ({"layers": {"a": {"knots": [[1, 2], [4]], "ms": [[0.5]]}}}, "one time for every size"),
        ({"layers": {"a": {"knots": [[1, 2], []], "ms": [[], []]}}}, "whole numbers >= 1"),
        ({"layers": {"a": {"knots": [[0, 2], [4]], "ms": [[0.5], [1]]}}}, "whole numbers >= 1"),
        ({"layers": {"a": {"knots": [[1.0], [4]], "ms": [[0.5]]}}}, "whole numbers >= 1"),
        ({"layers": {"a": {"knots": [[True], [4]], "ms": [[0.5]]}}}, "whole numbers >= 1"),
        ({"layers": {"a": {"knots": [[2, 2], [4]], "ms": [[0.5], [1]]}}}, "sizes must rise"),
        ({"layers": {"a": {"knots": [[1]], "ms": [[0.5]]}}}, "is damaged"),
        ({"layers": {"a": {"knots": [[1], [4]], "ms": [["1"]]}}}, "'1' is no time"),
        ({"layers": {"a": {"knots": [[1], [4]], "ms": [[-1.0]]}}}, "is no time in milliseconds"),
        ({"layers": {"a": {"knots": [[1], [4]], "ms": [[float("nan")]]}}}, "nan is no time"),
        ({"rest_ms": {"m": float("inf")}}, "inf is no time"),
        ({"rest_ms": [1]}, "is damaged"),
    ],
)
def test_damaged_tables(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    path = tmp_path / "times.json"
    path.write_text(json.dumps(GOOD))
    assert latency.read(path).curves["a"] == Curve(((1, 2), (4,)), ((0.5,), (1.0,)))
    path.write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(psap.FileError, match=match):
        latency.read(path)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_files_that_are_no_tables(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "times.json"
    path.write_bytes(text)
    with pytest.raises(psap.FileError, match="is no latency table"):
        psap.measure_latency(_graph(4), path)
    assert path.read_bytes() == text
    with pytest.raises(psap.FileError, match="none cannot be read"):
        latency.read(tmp_path / "none")


# From widths to times


def test_between_the_knots() -> None:
    curves = [
        Curve(((2, 4, 8), (1, 3)), ((1.0, 2.0), (2.0, 4.0), (6.0, 8.0))),
        Curve(((5, 10), (3,)), ((1.0,), (3.0,))),
    ]
    times = latency.Times([0, 1], curves, 0.0)

    def at(*sizes: tuple[float, float]) -> list[float]:
        return times.of(np.arange(2), np.array(sizes, dtype=np.float64).T).tolist()

    assert at((4, 3), (10, 3)) == [4.0, 3.0]
    assert at((3, 1), (7.5, 3)) == [1.5, 2.0]
    assert at((6, 2), (5, 3)) == [5.0, 1.0]
    assert at((1, 1), (1, 3)) == [1.0, 1.0]  # not below the smallest that was timed
    assert at((9, 9), (99, 99)) == [8.0, 3.0]


def test_predicted_times_are_those_of_the_small_network(clock: list[Any]) -> None:
    """On a clock that counts MACs, the prediction at the knots is exact."""
    graph = _graph(8, 16)
    table = psap.measure_latency(graph)
    cost = CostModel(graph, table)
    for widths in ([8, 16], [4, 8], [2, 12], [8, 4]):
        wanted = (8 * 8 * (3 * widths[0] + widths[0] * widths[1]) + 5 * widths[1]) / 1e6
        share = cost.cost(widths).activations / cost.dense.activations  # type: ignore[operator]
        assert cost.cost(widths).latency_ms == pytest.approx(wanted + 0.25 * share)
    assert CostModel(graph).dense.latency_ms is None


@pytest.mark.parametrize("name", ["residual", "dense block", "grouped", "chunk", "transposed"])
def test_what_one_group_changes(name: str, clock: list[Any]) -> None:
    graph = psap.trace(randomise(CASES[name].make()), CASES[name].inputs)
    cost = CostModel(graph, psap.measure_latency(graph))
    rng = np.random.default_rng(0)
    for _ in range(5):
        widths, others = rng.integers(1, cost.sizes + 1), rng.integers(1, cost.sizes + 1)
        found = cost.changes(widths, others)
        room = Budget(cost, psap.Target(latency=0.5)).room(widths, others)
        for group in range(len(widths)):
            alone = np.where(np.arange(len(widths)) == group, others, widths)
            wanted = cost.totals(alone) - cost.totals(widths)
            assert found[3, group] == pytest.approx(wanted[3], abs=1e-9)
            assert room[group] == cost.fits(alone, psap.Target(latency=0.5))


def test_a_latency_budget(clock: list[Any]) -> None:
    graph = _graph(16, 24, 16)
    table = psap.measure_latency(graph)
    plan = psap.plan(graph, target=psap.Target(latency=0.6), latency=table)
    before, after = plan.before.latency_ms, plan.after.latency_ms
    assert before is not None and after is not None
    assert 0.55 * before < after <= 0.6 * before
    assert f"predicted latency {before:.3f} -> {after:.3f} ms" in plan.explain()
    assert psap.Plan.from_json(plan.to_json()) == plan
    with pytest.raises(psap.TargetError, match=r"[\d.]+% of the predicted latency; raise the"):
        psap.plan(graph, target=psap.Target(latency=0.01), latency=table, min_channels=8)


def test_a_pruner_keeps_a_latency_budget(clock: list[Any]) -> None:
    model = randomise(chain(16, 24))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    config = psap.Config(target=psap.Target(latency=0.6), prune_steps=2)
    with pytest.raises(psap.ArgumentError, match=r"Target\(latency=...\) needs times that were"):
        psap.Pruner(model, image(), optimizer=optimizer, config=config)
    table = psap.measure_latency(psap.trace(model, image()))
    pruner = psap.Pruner(model, image(), optimizer=optimizer, config=config, latency=table)
    for seed in range(2):
        train_step(model, optimizer, seed, (image(),))
        pruner.step()
    plan = pruner.finish().plan
    assert plan.before.latency_ms is not None and plan.after.latency_ms is not None
    assert plan.after.latency_ms <= 0.6 * plan.before.latency_ms < 1.2 * plan.after.latency_ms


def test_a_latency_budget_needs_the_table_of_this_model(clock: list[Any]) -> None:
    graph = _graph(8, 6)
    target = psap.Target(latency=0.5)
    with pytest.raises(psap.ArgumentError, match=r"Target\(latency=...\) needs times that were"):
        psap.plan(graph, target=target)
    other = psap.measure_latency(_graph(8, 7))
    with pytest.raises(psap.ArgumentError, match=r"the latency table does not know 3\.weight"):
        psap.plan(graph, target=target, latency=other)
    bare = LatencyTable(other.machine, psap.measure_latency(graph).curves, {})
    with pytest.raises(psap.ArgumentError, match="does not know this model; measure it with"):
        psap.plan(graph, target=target, latency=bare)
    with pytest.raises(psap.ArgumentTypeError, match=r"graph is a Sequential; pass psap\.trace"):
        psap.measure_latency(graph.model)  # type: ignore[arg-type]
    with pytest.raises(psap.ArgumentError, match="threads is 0; pass a whole number >= 1"):
        psap.measure_latency(graph, threads=0)


def test_real_times_of_a_larger_layer_are_longer() -> None:
    net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 256, 3), nn.Flatten())
    graph = psap.trace(net, torch.randn(1, 3, 32, 32))
    curve = list(psap.measure_latency(graph).curves.values())[1]
    assert curve.knots == ((32, 64, 128, 192, 256), (8, 16, 32, 48, 64))
    assert curve.ms[-1][-1] > 2 * curve.ms[1][1] > 0
    ms = np.array(curve.ms)
    assert (np.diff(ms, axis=0) >= 0).all() and (np.diff(ms, axis=1) >= 0).all()


# The fastest multiple


def _timed(monkeypatch: pytest.MonkeyPatch, ms: dict[int, float]) -> list[list[int]]:
    """Times by the width of the first layer."""
    widths: list[list[int]] = []

    def latencies(models: Any, *_: Any, **__: Any) -> list[measure.Latency]:
        widths.append([model[0].out_channels for model in models])
        return [measure.Latency(median_ms=ms[w], p20_ms=ms[w], p80_ms=ms[w], repeats=1, threads=1,
                                device="cpu") for w in widths[-1]]  # fmt: skip

    monkeypatch.setattr(measure, "latencies", latencies)
    return widths


def test_the_fastest_multiple_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = _graph(27, 32)
    widths = _timed(monkeypatch, {14: 1.3, 16: 1.0, 27: 9.0})
    found = rounding.fastest(graph, ratio=0.5)
    assert widths == [[14, 16, 27]]  # 2 gives the plan of 1, and 8 and 16 that of 4
    assert found.round_to == 4 and [len(g.kept) for g in found.plan.groups] == [16, 16]
    assert "multiples of  4: 1.000 ms (1.000 to 1.000)  <- --round-to 4" in found.explain()
    assert psap.plan(graph, ratio=0.5, round_to="measured") == found.plan


def test_the_finest_multiple_of_those_that_are_as_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    _timed(monkeypatch, {14: 1.02, 16: 1.0, 27: 9.0})
    assert rounding.fastest(_graph(27, 32), ratio=0.5).round_to == 1
    with pytest.raises(psap.ArgumentError, match="candidates is empty"):
        rounding.fastest(_graph(4), ratio=0.5, candidates=())


def test_multiples_that_are_too_coarse_for_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    _timed(monkeypatch, dict.fromkeys(range(33), 1.0))
    found = rounding.fastest(_graph(32, 32), target=psap.Target(macs=0.3))
    assert set(found.times) == {
        1,
        2,
    }  # 4 to 16 give the plan of 2; 32 cannot make 32 channels fewer
    with pytest.raises(psap.TargetError, match="cannot be met"):
        rounding.fastest(_graph(32, 32), target=psap.Target(macs=0.0001))


def test_programs_are_timed_too() -> None:
    case = CASES["padded shortcut"]
    graph = psap.trace(randomise(case.make()), case.inputs)
    found = rounding.fastest(graph, ratio=0.5, candidates=(1, 2), repeats=1)
    assert found.round_to in found.times and found.plan.sides


def test_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], clock: list[Any]
) -> None:
    table = str(tmp_path / "times.json")
    options = ["latency", "--arch", "digits_resnet", "--table", table]
    assert cli.main(options) == 0
    text = capsys.readouterr().out
    assert "everything else" in text and "<- --round-to" in text and "predicted latency" in text
    assert cli.main([*options, "--target-latency", "0.7"]) == 0
    assert "kept)" in capsys.readouterr().out
    Path(table).write_text("{}")
    assert cli.main(options) == 2
    assert "times.json is no latency table" in capsys.readouterr().err


def test_multiples_are_measured_where_norms_count_channels() -> None:
    case = CASES["layer norm"]
    graph = psap.trace(randomise(case.make()), case.inputs)
    found = rounding.fastest(graph, ratio=0.5, candidates=(1, 2), repeats=2)
    assert found.plan.counted and found.round_to in (1, 2)
