"""Plans: how many channels go, which ones, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from nets import chain, image, randomise
from pruner_nets import NETS
from torch import nn
from zoo import CASES

import psap


def _graph(*widths: int, seed: int = 0) -> psap.Graph:
    return psap.trace(randomise(chain(*widths), seed), image())


def _kept(plan: psap.Plan) -> dict[str, int]:
    return {group.name: len(group.kept) for group in plan.groups}


@pytest.mark.parametrize(
    ("ratio", "kept"), [(0.0, [8, 11]), (0.5, [4, 6]), (0.3, [6, 8]), (0.999, [1, 1]), (0, [8, 11])]
)
def test_ratio_removes_the_floor_of_the_share(ratio: float, kept: list[int]) -> None:
    plan = psap.plan(_graph(8, 11), ratio=ratio)
    assert list(_kept(plan).values()) == kept


def test_ratio_by_name_leaves_the_others() -> None:
    graph = _graph(8, 11)
    assert _kept(psap.plan(graph, ratio={"3": 0.5})) == {"0": 8, "3": 6}
    with pytest.raises(psap.ArgumentError, match=r"ratio names 'x', which is no group"):
        psap.plan(graph, ratio={"x": 0.5})
    with pytest.raises(psap.ArgumentError, match=r"ratio names 3, which is no group"):
        psap.plan(graph, ratio={3: 0.5})  # type: ignore[dict-item]


@pytest.mark.parametrize("round_to", [1, 2, 3, 4, 8, 100])
@pytest.mark.parametrize("min_channels", [1, 5, 100])
def test_widths_are_multiples_and_not_too_small(round_to: int, min_channels: int) -> None:
    plan = psap.plan(_graph(16, 21), ratio=0.7, round_to=round_to, min_channels=min_channels)
    for group in plan.groups:
        width = len(group.kept)
        assert width % round_to == 0 or width == group.size
        assert width >= min(group.size, min_channels)


@pytest.mark.parametrize("score", ["l1", "l2"])
def test_the_strongest_channels_stay(score: Any) -> None:
    model = randomise(chain(6, 4))
    with torch.no_grad():
        model[0].weight *= torch.tensor([1.0, 9, 2, 8, 3, 7]).view(-1, 1, 1, 1)
    plan = psap.plan(psap.trace(model, image()), ratio=0.5, score=score)
    assert plan.groups[0].kept == (1, 3, 5)


def test_importances_may_be_given() -> None:
    graph = _graph(4, 3)
    given = {"0": torch.tensor([1.0, 4, 2, 3]), "3": torch.tensor([3, 2, 1])}
    plan = psap.plan(graph, ratio=0.5, score=given)
    assert [group.kept for group in plan.groups] == [(1, 3), (0, 1)]
    for wrong, match in (
        ({"0": given["0"]}, "no entry for group '3'"),
        ({**given, "9": given["0"]}, "score names '9', which is no group"),
        ({**given, "3": torch.ones(4)}, r"score\['3'\] must be finite and of shape \[3\]"),
        ({**given, "3": torch.tensor([1, float("nan"), 2])}, "must be finite"),
        ({**given, "3": "high"}, r"score\['3'\] must be a tensor"),
    ):
        with pytest.raises(psap.PsapError, match=match):
            psap.plan(graph, ratio=0.5, score=wrong)  # type: ignore[arg-type]


def test_random_scores_follow_the_seed() -> None:
    graph = _graph(16, 16)
    plans = [psap.plan(graph, ratio=0.5, score="random", seed=seed) for seed in (1, 1, 2)]
    assert plans[0] == plans[1] != plans[2]


@pytest.mark.parametrize("name", ["residual", "dense block", "depthwise, multiplier 3", "flatten"])
@pytest.mark.parametrize("share", [0.8, 0.5, 0.25])
@pytest.mark.parametrize("kind", ["macs", "parameters"])
def test_a_target_is_met_within_one_channel(name: str, share: float, kind: str) -> None:
    graph = psap.trace(randomise(CASES[name].make()), image())
    plan = psap.plan(graph, target=psap.Target(**{kind: share}))
    allowed = share * getattr(plan.before, kind)
    assert getattr(plan.after, kind) <= allowed
    cost = psap.cost.CostModel(graph)  # type: ignore[attr-defined]
    widths = np.array([len(group.kept) for group in plan.groups])
    for index, group in enumerate(plan.groups):
        if widths[index] < group.size:
            larger = widths + (np.arange(len(widths)) == index)
            assert getattr(cost.cost(larger), kind) > allowed


def test_both_bounds_at_once() -> None:
    plan = psap.plan(_graph(16, 24, 32), target=psap.Target(macs=0.5, parameters=0.2))
    assert plan.after.macs <= 0.5 * plan.before.macs
    assert plan.after.parameters <= 0.2 * plan.before.parameters


def test_a_target_of_one_keeps_everything() -> None:
    plan = psap.plan(_graph(8, 11), target=psap.Target(macs=1.0))
    assert plan.after == plan.before and not plan.sides


def test_an_unreachable_target_says_what_is_possible() -> None:
    with pytest.raises(
        psap.TargetError,
        match=r"^Target\(\w+=[\d.e-]+\) cannot be met: .* keeps [\d.]+% of the MACs",
    ):
        psap.plan(_graph(4, 4), target=psap.Target(macs=0.01))
    with pytest.raises(psap.TargetError, match="lower min_channels"):
        psap.plan(_graph(16, 16), target=psap.Target(macs=0.2), min_channels=12)


@pytest.mark.parametrize("value", [0, 0.0, 1.5, -0.1, float("nan"), float("inf")])
def test_a_target_outside_its_range(value: float) -> None:
    with pytest.raises(psap.ArgumentError, match=r"Target.macs is .*in \(0, 1\]"):
        psap.Target(macs=value)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "either ratio=0.5 or target"),
        ({"ratio": 0.5, "target": psap.Target(macs=0.5)}, "either ratio=0.5 or target"),
        ({"ratio": 1}, "ratio is 1; pass the removed share"),
        ({"ratio": 1.5}, "ratio is 1.5"),
        ({"ratio": -0.1}, "ratio is -0.1"),
        ({"ratio": float("nan")}, "ratio is nan"),
        ({"ratio": "half"}, "ratio is 'half'"),
        ({"ratio": True}, "ratio is True"),
        ({"ratio": {"0": None}}, "ratio is None"),
        ({"target": 0.3}, r"target is 0.3; pass psap.Target\(macs=0.3\)"),
        ({"ratio": 0.5, "score": "taylor"}, "score is 'taylor'"),
        ({"ratio": 0.5, "score": ["l1"]}, r"score is \['l1'\]"),
        ({"ratio": 0.5, "round_to": 0}, "round_to is 0; pass a whole number >= 1"),
        ({"ratio": 0.5, "round_to": 2.0}, "round_to is 2.0"),
        ({"ratio": 0.5, "min_channels": -3}, "min_channels is -3"),
        ({"ratio": 0.5, "min_channels": True}, "min_channels is True"),
        ({"ratio": 0.5, "score": "random", "seed": -1}, "seed is -1"),
    ],
)
def test_bad_arguments(options: dict[str, Any], match: str) -> None:
    with pytest.raises((psap.ArgumentError, psap.ArgumentTypeError), match=match):
        psap.plan(_graph(4), **options)


def test_a_model_in_place_of_the_graph() -> None:
    with pytest.raises(TypeError, match=r"graph is a Sequential; pass psap.trace"):
        psap.plan(chain(4), ratio=0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value: float) -> None:
    graph = _graph(8, 8)
    with torch.no_grad():
        graph.model[3].weight[2, 1, 0, 0] = value  # type: ignore[index]
    with pytest.raises(psap.PsapError, match=r"3.weight holds 1 values that are not finite"):
        psap.plan(graph, ratio=0.5)


def test_a_frozen_model_is_refused_by_name() -> None:
    model = chain(8, 8).requires_grad_(False)
    graph = psap.trace(model, torch.zeros(1, 3, 8, 8))
    with pytest.raises(psap.TargetError, match=r"0: 0.weight is frozen \(requires_grad is False\)"):
        psap.plan(graph, ratio=0.5)


def test_a_partly_frozen_model_is_pruned_in_part() -> None:
    model = randomise(chain(8, 8, 8))
    model[0].requires_grad_(False)
    plan = psap.plan(psap.trace(model, image()), ratio=0.5)
    assert _kept(plan) == {"3": 4, "6": 4}
    assert "0.weight is frozen" in plan.left_alone["0"]
    assert "0.weight is frozen (requires_grad is False)" in plan.explain()


def test_a_model_without_anything_to_prune() -> None:
    with pytest.raises(psap.TargetError, match="no layer of this model can be pruned: 0: output"):
        psap.plan(psap.trace(nn.Sequential(nn.Linear(3, 2)), torch.zeros(1, 3)), ratio=0.5)


def test_threads_do_not_change_the_plan() -> None:
    graph = _graph(64, 48, 80)
    plans = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            plans.append(psap.plan(graph, target=psap.Target(macs=0.37)))
        finally:
            torch.set_num_threads(1)
    assert plans[0] == plans[1]
    assert plans[0].to_json() == plans[1].to_json()


def test_the_model_is_not_changed() -> None:
    from nets import assert_same, snapshot

    graph = _graph(8, 8)
    before = snapshot(graph.model)
    psap.plan(graph, target=psap.Target(macs=0.5), score="l1")
    assert_same(before, snapshot(graph.model))


def test_explain_tells_every_group_and_reason() -> None:
    text = psap.plan(psap.trace(randomise(CASES["residual"].make()), image()), ratio=0.5).explain()
    assert "stem          8 ->     4  (4 removed)  with bn, one, two, bn2 ...\n" in text
    assert "one          10 ->     5  (5 removed)  with bn1, two\n" in text
    assert "left alone:\n  head.2    output of the model" in text


def test_equal_channels_are_taken_from_the_end() -> None:
    model = chain(6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    plan = psap.plan(psap.trace(model, torch.zeros(1, 3, 8, 8)), ratio=0.5)
    assert plan.groups[0].kept == (0, 1, 2)


def test_a_model_that_changed_since_the_trace_is_refused() -> None:
    graph = _graph(8, 6)
    psap.apply(graph.model, psap.plan(graph, ratio=0.5), inplace=True)
    with pytest.raises(
        psap.ArgumentError, match=r"the model has changed since it was traced; trace it again"
    ):
        psap.plan(graph, ratio=0.5)
    assert psap.plan(psap.trace(graph.model, image()), ratio=0.5).groups[0].size == 4
    del graph.model[0]
    with pytest.raises(psap.ArgumentError, match=r"the model has changed.* \d\.\w+ had shape"):
        psap.plan(graph, ratio=0.5)


def test_a_plan_prints_as_one_line() -> None:
    found = psap.plan(_graph(1000, 600), ratio=0.5)
    share = 100 * found.after.macs / found.before.macs
    assert repr(found).startswith(f"Plan(Sequential: 2 groups, MACs {share:.1f} % kept, parameters")
    assert len(repr(found)) < 100
    assert repr(psap.Plan.from_json(found.to_json())).startswith("Plan(2 groups, MACs ")


def test_a_plan_spares_streams_as_a_pruner_does() -> None:
    net = NETS["residual"]()
    graph = psap.trace(net, torch.randn(2, 3, 8, 8))
    kept = {g.name: len(g.kept) for g in psap.plan(graph, target=psap.Target(macs=0.4)).groups}
    config = psap.Config(target=psap.Target(macs=0.4), prune_steps=1)
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    pruner = psap.Pruner(net, torch.randn(2, 3, 8, 8), optimizer=opt, config=config)
    pruner._catch_up()  # the prune step alone, on the weights that the plan saw
    assert kept == {name: int(mask.sum()) for name, mask in pruner.masks().items()}
