"""Scores: against sums that are written out, for every kind of producer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nets import chain, image, randomise
from torch import Tensor
from zoo import CASES

import psap
import psap_kernels
from psap import scores


def _measure(
    graph: psap.Graph, alpha: float | None = 0.5, score: str = "l2"
) -> list[scores.GroupStats]:
    return scores.measure(graph, dict(graph.model.named_parameters()), alpha, score)  # type: ignore[arg-type]


def _expected(graph: psap.Graph, score: str) -> dict[str, np.ndarray]:
    """Power per producer and channel, one weight at a time."""
    tensors = dict(graph.model.named_parameters())
    result = {}
    for group in graph.groups:
        power = np.zeros((len(group.producers), group.size))
        for row, name in enumerate(group.producers):
            weight = tensors[name].detach()
            dim = next(d for n, d in group.sides if n == name and graph.roles[n, d] == "out")
            for position, channel in enumerate(graph.channels[name, dim].tolist()):
                if group.start <= channel < group.start + group.size:
                    values = weight.select(dim, position).double()
                    amount = values.square().sum() if score == "l2" else values.abs().sum()
                    power[row, channel - group.start] += float(amount)
        result[group.name] = power
    return result


@pytest.mark.parametrize("score", ["l1", "l2"])
@pytest.mark.parametrize(
    "name",
    ["residual", "depthwise, multiplier 3", "grouped", "transposed", "slices", "raw parameter",
     "shuffle, grouped", "flatten", "conv1d", "conv3d", "parameter of two modules"],
)  # fmt: skip
def test_against_sums_written_out(name: str, score: str) -> None:
    graph = psap.trace(randomise(CASES[name].make()), CASES[name].inputs)
    expected = _expected(graph, score)
    for group, stats in zip(graph.groups, _measure(graph, score=score), strict=True):
        np.testing.assert_allclose(stats.power, expected[group.name], rtol=1e-5)
        mean = expected[group.name].mean(axis=1, keepdims=True)
        relative = (expected[group.name] / mean).mean(axis=0)
        wanted = np.sqrt(relative) if score == "l2" else relative
        np.testing.assert_allclose(scores.importance(stats, score), wanted, rtol=1e-5)  # type: ignore[arg-type]


def test_sparsity_counts_weights_below_the_threshold() -> None:
    graph = psap.trace(randomise(CASES["residual"].make()), image())
    tensors = dict(graph.model.named_parameters())
    for alpha in (0.1, 0.5, 2.0):
        for group, stats in zip(graph.groups, _measure(graph, alpha), strict=True):
            weights = [tensors[name].detach() for name in group.producers]
            below = sum(int((w.abs() < alpha * w.std(correction=0)).sum()) for w in weights)
            assert stats.elements == sum(w.numel() for w in weights)
            assert abs(stats.sparse - below) <= 1  # a weight on the edge, in float32
            assert stats.sparsity == stats.sparse / stats.elements


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("name", ["residual", "grouped", "transposed", "depthwise, multiplier 3"])
def test_a_quantile_over_all_layers_may_be_the_threshold(name: str, quantile: float) -> None:
    """Weights in units of He's standard deviation of their layer, of which a share is sparse."""
    graph = psap.trace(randomise(CASES[name].make()), CASES[name].inputs)
    tensors = dict(graph.model.named_parameters())
    producers = list(dict.fromkeys(n for group in graph.groups for n in group.producers))
    units = {}
    for producer in producers:
        outward = next(d for d in (0, 1) if graph.roles.get((producer, d)) == "out")
        weight = tensors[producer].detach().movedim(outward, 0)
        units[producer] = weight.abs().double() / (2 / weight[0].numel()) ** 0.5
    everything = np.concatenate([u.flatten().numpy() for u in units.values()])
    tau = np.quantile(everything, quantile, method="inverted_cdf")
    found = scores.measure(graph, tensors, 0.5, "l2", quantile)
    for group, stats in zip(graph.groups, found, strict=True):
        if len(group.producers) == 1 and group.size == units[group.producers[0]].shape[0]:
            below = int((units[group.producers[0]] < tau).sum())
            assert abs(stats.sparse - below) <= 1  # a weight on the edge, in float32
    counted = sum(s.sparse for s in found) / sum(s.elements for s in found)
    assert counted == pytest.approx(quantile, abs=0.02)


def test_layers_of_one_spread_are_told_apart_by_a_quantile_alone() -> None:
    """The std threshold does not see a layer's scale; the quantile does."""
    model = randomise(chain(16, 16))
    with torch.no_grad():
        model[0].weight.normal_(0, 0.1)
        model[3].weight.normal_(0, 0.1 * (27 / 144) ** 0.5 / 2)  # half of the other, by its fan
    graph = psap.trace(model, image())
    one, two = (s.sparsity for s in _measure(graph))
    assert one == pytest.approx(two, abs=0.05)
    tensors = dict(graph.model.named_parameters())
    one, two = (s.sparsity for s in scores.measure(graph, tensors, 0.5, "l2", 0.5))
    assert two > one + 0.2


def test_powers_alone_take_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    passes, before = [], psap_kernels.layer_stats
    monkeypatch.setattr(
        psap_kernels, "layer_stats", lambda *a, **k: passes.append(k) or before(*a, **k)
    )
    graph = psap.trace(randomise(CASES["residual"].make()), image())
    both = _measure(graph)
    assert len(passes) == 2
    alone = _measure(graph, None)
    assert len(passes) == 3
    for one, two in zip(both, alone, strict=True):
        assert (one.power == two.power).all() and one.elements == two.elements
        assert one.sparse > two.sparse == 0
    psap.plan(graph, ratio=0.5)
    assert len(passes) == 4
    psap.plan(graph, target=psap.Target(macs=0.5))
    assert len(passes) == 6


def test_a_dead_layer_is_wholly_sparse_and_a_constant_one_not_at_all() -> None:
    model = randomise(chain(8, 6))
    with torch.no_grad():
        model[0].weight.zero_()
        model[3].weight.fill_(0.25)
    zero, constant = _measure(psap.trace(model, image()))
    assert (zero.sparsity, constant.sparsity) == (1.0, 0.0)
    assert (scores.importance(zero) == 0).all() and (scores.importance(constant) == 1).all()


def test_scale_of_a_layer_does_not_matter() -> None:
    model = randomise(CASES["residual"].make())
    graph = psap.trace(model, image())
    before = [scores.importance(stats) for stats in _measure(graph)]
    with torch.no_grad():
        model.two.weight *= 1000.0  # type: ignore[union-attr,operator]
    after = [scores.importance(stats) for stats in _measure(graph)]
    for one, two in zip(before, after, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_name_the_layer(value: float) -> None:
    model = randomise(chain(8, 6))
    with torch.no_grad():
        model[3].weight[:2, 0, 0, 0] = value
    with pytest.raises(psap.PsapError, match=r"3.weight holds 2 values that are not finite"):
        _measure(psap.trace(model, image()))


def test_other_tensors_may_be_measured() -> None:
    graph = psap.trace(randomise(chain(4, 4)), image())
    ones: dict[str, Tensor] = {n: torch.ones_like(p) for n, p in graph.model.named_parameters()}
    stats = scores.measure(graph, ones, 0.5)
    assert stats[0].power.tolist() == [[27.0] * 4]


def test_strongest() -> None:
    values = np.array([1.0, 3, 2, 3, np.nan, 0])
    assert scores.strongest(values, 2) == (1, 3)
    assert scores.strongest(values, 3) == (1, 2, 3)
    assert scores.strongest(values, 5) == (0, 1, 2, 3, 5)
    assert scores.strongest(np.zeros(4), 2) == (0, 1)
    assert scores.strongest(values, 6) == (0, 1, 2, 3, 4, 5)
