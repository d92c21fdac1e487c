"""Floors by the name of a layer: in a plan, in a `Pruner`, on the command line."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import tyro
from pruner_nets import NETS, inputs, make, train

import psap
from psap import choices
from psap.models import create
from psap.run_config import RunConfig


def shares(plan: psap.Plan) -> dict[str, float]:
    return {group.name: len(group.kept) / group.size for group in plan.groups}


def graph(name: str = "residual") -> psap.Graph:
    return psap.trace(NETS[name](), inputs())


@pytest.mark.parametrize(
    ("floors", "wanted"),
    [({}, {"stem": 0.0, "conv1": 0.0, "conv3": 0.0}),
     ({"conv1": 0.7}, {"stem": 0.0, "conv1": 0.7, "conv3": 0.0}),
     ({"conv1.weight": 0.7}, {"stem": 0.0, "conv1": 0.7, "conv3": 0.0}),
     ({"conv2": 0.6}, {"stem": 0.6, "conv1": 0.0, "conv3": 0.0}),  # the stream of the stem
     ({"conv*": 0.5, "conv1": 0.3}, {"stem": 0.5, "conv1": 0.5, "conv3": 0.5}),
     ({"head": 1.0}, {"stem": 0.0, "conv1": 0.0, "conv3": 0.0}),  # makes the outputs
     ({"*": 0.9, "stem": 1}, {"stem": 1.0, "conv1": 0.9, "conv3": 0.9})],
)  # fmt: skip
def test_names_find_groups(floors: dict[str, float], wanted: dict[str, float]) -> None:
    traced = graph()
    found = dict(zip([g.name for g in traced.groups], choices.floors(traced, floors), strict=True))
    assert found == wanted


def test_the_name_of_a_module_stands_for_all_layers_inside() -> None:
    traced = psap.trace(create("resnet20"), torch.zeros(1, 3, 32, 32))
    plan = psap.plan(traced, ratio=0.75, floors={"layer2": 0.5, "layer3.1.conv1": 1})
    inside = {name: share for name, share in shares(plan).items() if name.endswith(".conv1")}
    for name, share in inside.items():
        wanted = 1.0 if name == "layer3.1.conv1" else 0.5 if name.startswith("layer2") else 0.25
        assert share == wanted, name
    assert shares(plan)["conv1"] == 0.5  # goes on in the stream of layer2, whose layers it feeds


@pytest.mark.parametrize("call", ["plan", "pruner"])
def test_a_name_that_no_layer_has_is_refused_with_those_that_are_near(call: str) -> None:
    model = NETS["residual"]()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(psap.ArgumentError, match=r"floors names 'convv1', which is no.*conv1"):
        if call == "plan":
            psap.plan(psap.trace(model, inputs()), ratio=0.5, floors={"convv1": 0.5})
        else:
            config = psap.Config(floors={"convv1": 0.5})
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            psap.Pruner(model, inputs(), optimizer=optimizer, config=config)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_target_that_floors_forbid_is_refused() -> None:
    with pytest.raises(psap.TargetError, match=r"cannot be met.*lower min_channels or floors"):
        psap.plan(graph(), target=psap.Target(macs=0.3), floors={"*": 0.9})
    with pytest.raises(psap.TargetError, match=r"cannot be met.*lower min_channels or floors"):
        make("residual", target=psap.Target(macs=0.3), floors={"*": 0.9})


@pytest.mark.parametrize("round_to", [1, 4, "measured"])
def test_plans_keep_floors_and_the_target(round_to: Any) -> None:
    floors = {"conv1": 0.75, "conv3": 0.6}
    plan = psap.plan(graph(), target=psap.Target(macs=0.7), floors=floors, round_to=round_to)
    found = shares(plan)
    assert found["conv1"] >= 0.75 and found["conv3"] >= 0.6
    assert plan.after.macs <= 0.7 * plan.before.macs


@pytest.mark.parametrize("progressive", [False, True])
def test_a_pruner_keeps_floors_at_every_step_and_meets_the_target(progressive: bool) -> None:
    floors = {"conv1": 1, "conv3": 0.5}
    target = psap.Target(macs=0.55)
    model, opt, pruner = make("residual", target=target, floors=floors, progressive=progressive)
    free = make("residual", target=target)
    while not pruner.done:
        train(model, opt, pruner)
        widths = {name: int(mask.sum()) for name, mask in pruner.masks().items()}
        assert widths["conv1"] == 8 and widths["conv3"] >= 6
    result = pruner.finish()
    assert result.plan.after.macs <= 0.55 * result.plan.before.macs
    train(free[0], free[1], free[2], epochs=3)
    assert shares(free[2].finish().plan)["conv1"] < 1  # what the floor has changed


def test_a_state_knows_its_floors() -> None:
    model, opt, pruner = make("residual", target=psap.Target(macs=0.6), floors={"conv1": 0.9})
    train(model, opt, pruner)
    state = copy.deepcopy(pruner.state_dict())
    same = make("residual", target=psap.Target(macs=0.6), floors={"conv1": 0.9})[2]
    same.load_state_dict(state)
    other = make("residual", target=psap.Target(macs=0.6))[2]
    with pytest.raises(psap.StateError, match=r"floors was \{'conv1': 0.9\} and is \{\}"):
        other.load_state_dict(state)


def test_floors_on_the_command_line() -> None:
    words = ["--target-macs", "0.5", "--floors", "conv1", "1.0", "layer3.*", "0.5"]
    config = tyro.cli(RunConfig, args=words)
    assert config.pruning().floors == {"conv1": 1.0, "layer3.*": 0.5}
