"""Optimizers through a shrink: order, options, schedulers, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import assert_same, chain, image, randomise, snapshot, train_step
from torch import nn

import psap

Make = Callable[[Any], torch.optim.Optimizer]


@pytest.mark.parametrize("inplace", [False, True])
def test_groups_keep_order_and_options(inplace: bool) -> None:
    model = randomise(chain(8, 6)).train()
    norms = [p for m in model if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
    others = [p for p in model.parameters() if not any(p is q for q in norms)]
    optimizer = torch.optim.SGD(
        [
            {"params": norms[::-1], "weight_decay": 0.0, "note": {"kind": "norm"}},
            {"params": others, "lr": 0.5, "nesterov": True, "momentum": 0.8},
        ],
        lr=0.1,
        momentum=0.9,
        weight_decay=0.2,
    )
    train_step(model, optimizer, 0, (image(),))
    names = {id(p): name for name, p in model.named_parameters()}
    before = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    options = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    plan = psap.plan(psap.trace(model, image()), ratio=0.5)
    result = psap.apply(model, plan, optimizer=optimizer, inplace=inplace)
    assert type(result.optimizer) is torch.optim.SGD
    names = {id(p): name for name, p in result.model.named_parameters()}
    groups = result.optimizer.param_groups
    assert [[names[id(p)] for p in group["params"]] for group in groups] == before
    assert [{k: v for k, v in g.items() if k != "params"} for g in groups] == options
    assert result.optimizer.defaults == optimizer.defaults
    for parameter, state in result.optimizer.state.items():
        assert state["momentum_buffer"].shape == parameter.shape
    if not inplace:
        groups[0]["note"]["kind"] = "changed"
        assert optimizer.param_groups[0]["note"] == {"kind": "norm"}


def test_a_new_optimizer_leaves_the_old_one_alone() -> None:
    model = randomise(chain(8, 6)).train()
    optimizer = torch.optim.Adam(model.parameters())
    train_step(model, optimizer, 0, (image(),))
    before, state = snapshot(model), copy.deepcopy(optimizer.state_dict())
    plan = psap.plan(psap.trace(model, image()), ratio=0.5)
    result = psap.apply(model, plan, optimizer=optimizer)
    assert result.optimizer is not None
    train_step(result.model, result.optimizer, 1, (image(),))
    assert_same(before, snapshot(model))
    assert str(optimizer.state_dict()) == str(state)
    clone = torch.optim.Adam(result.model.parameters())
    clone.load_state_dict(result.optimizer.state_dict())


def test_an_optimizer_of_some_of_the_parameters() -> None:
    model = randomise(chain(8, 6)).train()
    optimizer = torch.optim.Adam(model[3].parameters())
    train_step(model, optimizer, 0, (image(),))
    plan = psap.plan(psap.trace(model, image()), ratio=0.5)
    result = psap.apply(model, plan, optimizer=optimizer)
    assert result.optimizer is not None
    (group,) = result.optimizer.param_groups
    assert [p.shape for p in group["params"]] == [(3, 4, 3, 3)]


def test_an_optimizer_without_state_yet() -> None:
    model = randomise(chain(8, 6)).train()
    optimizer = torch.optim.Adam(model.parameters())
    plan = psap.plan(psap.trace(model, image()), ratio=0.5)
    result = psap.apply(model, plan, optimizer=optimizer)
    assert result.optimizer is not None and not result.optimizer.state
    train_step(result.model, result.optimizer, 0, (image(),))
    assert len(result.optimizer.state) == len(list(result.model.parameters()))


def test_schedulers_of_every_sort_go_on_in_place() -> None:
    model = randomise(chain(8, 6)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 3),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5),
        ],
        [3],
    )
    rates = []
    for epoch in range(6):
        train_step(model, optimizer, epoch, (image(),))
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
        if epoch == 2:
            plan = psap.plan(psap.trace(model, image()), ratio=0.5)
            psap.apply(model, plan, optimizer=optimizer, inplace=True)
    assert model[0].out_channels == 4
    assert rates[2] == pytest.approx(0.1) and rates[3] > rates[4] > rates[5]


def test_a_step_that_a_scheduler_wrapped_is_not_taken_over() -> None:
    model = randomise(chain(8, 6)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert "step" in vars(optimizer)  # bound to the old optimizer
    plan = psap.plan(psap.trace(model, image()), ratio=0.5)
    fresh = psap.apply(model, plan, optimizer=optimizer)
    assert fresh.optimizer is not None and "step" not in vars(fresh.optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    first = fresh.model[0].weight.detach().clone()
    train_step(fresh.model, fresh.optimizer, 0, (image(),))
    assert not torch.equal(fresh.model[0].weight, first)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


class Own(torch.optim.Optimizer):
    """A user's optimizer with attributes and entries of its own."""

    def __init__(self, params: Any, entry: Any = 0, attribute: Any = 0.25) -> None:
        super().__init__(params, {"lr": 0.1})
        self.rate, self.entry = attribute, lambda: entry

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state.setdefault("extra", copy.deepcopy(self.entry()))
                state["count"] = state.get("count", 0) + 1
                state["sum"] = state.get("sum", 0) + p.grad
                p.add_(state["sum"], alpha=-self.rate)


def test_attributes_of_a_users_optimizer_are_kept() -> None:
    model = randomise(chain(8, 6)).train()
    optimizer = Own(model.parameters(), entry={"a": [1, 2]})
    train_step(model, optimizer, 0, (image(),))
    plan = psap.plan(psap.trace(model, image()), ratio=0.5)
    result = psap.apply(model, plan, optimizer=optimizer)
    assert isinstance(result.optimizer, Own) and result.optimizer.rate == 0.25
    result.optimizer.entry = optimizer.entry  # functions are not taken over
    state = result.optimizer.state[result.model[0].weight]
    assert (state["count"], state["extra"], state["sum"].shape) == (1, {"a": [1, 2]}, (4, 3, 3, 3))
    train_step(result.model, result.optimizer, 1, (image(),))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda p: torch.optim.Adafactor(p, lr=0.01), r"keeps 'row_var' of shape .* for 0.weight"),
        (lambda p: Own(p, entry=[torch.zeros(8)]), "keeps tensors inside 'extra' for 0.weight"),
        (lambda p: Own(p, entry=torch.zeros(8, 3)), "keeps 'extra' of shape"),
        (lambda p: torch.optim.LBFGS(p, max_iter=1), "LBFGS keeps|keeps 'd' of shape"),
    ],
)  # fmt: skip
def test_state_that_cannot_be_cut_is_refused(make: Make, match: str, inplace: bool) -> None:
    model = randomise(chain(8, 6)).train()
    optimizer = make(model.parameters())
    model(image()).square().mean().backward()
    optimizer.step(lambda: model(image()).square().mean())  # type: ignore[arg-type,return-value]
    plan = psap.plan(psap.trace(model, image()), ratio=0.5)
    before, state = snapshot(model), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(psap.PsapError, match=match):
        psap.apply(model, plan, optimizer=optimizer, inplace=inplace)
    assert_same(before, snapshot(model))
    assert str(optimizer.state_dict()) == str(state)


@pytest.mark.parametrize("inplace", [False, True])
def test_an_optimizer_that_keeps_its_own_list_of_tensors(inplace: bool) -> None:
    model = randomise(chain(8, 6)).train()
    optimizer = Own(model.parameters(), attribute=[torch.zeros(8)])
    plan = psap.plan(psap.trace(model, image()), ratio=0.5)
    with pytest.raises(psap.PsapError, match="Own keeps tensors in 'rate'"):
        psap.apply(model, plan, optimizer=optimizer, inplace=inplace)


def test_optimizers_of_other_models() -> None:
    model, other = randomise(chain(8, 6)), randomise(chain(8, 6))
    plan = psap.plan(psap.trace(model, image()), ratio=0.5)
    for optimizer, match in (
        (torch.optim.SGD(other.parameters(), lr=0.1), "trains none of this model's parameters"),
        (
            torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.1),
            r"also trains \d+ parameters of another model",
        ),
    ):
        with pytest.raises(psap.ArgumentError, match=match):
            psap.apply(model, plan, optimizer=optimizer)
    with pytest.raises(TypeError, match="optimizer is a StepLR"):
        psap.apply(
            model,
            plan,
            optimizer=torch.optim.lr_scheduler.StepLR(optimizer, 1),  # type: ignore[arg-type]
        )
