"""Optimizers through a shrink: the small net goes on exactly as the masked dense net would."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import assert_same, chain, image, randomise, snapshot
from torch import nn
from zoo import CASES

import psap
from psap import shrink

Make = Callable[[Any], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.002),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=0.002, momentum=0.9, weight_decay=1e-3),
    "sgd dampening": lambda p: torch.optim.SGD(p, lr=0.002, momentum=0.9, dampening=0.3),
    "sgd nesterov": lambda p: torch.optim.SGD(p, lr=0.002, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adam maximize off, foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "adamw amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True, weight_decay=0.1),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.002),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.002),
    "rmsprop centered": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.5),
}


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, inputs: Any) -> float:
    optimizer.zero_grad()
    out = model(inputs[0] + 0.1 * image(*inputs[0].shape, seed=seed))
    target = torch.arange(out.numel(), dtype=out.dtype).sin().view_as(out)
    loss = (out - target).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def _masked_training(
    model: nn.Module, optimizer: torch.optim.Optimizer, plan: psap.Plan, inputs: Any
) -> list[float]:
    """Ten steps of the dense net; what was pruned is put back to zero after every step."""
    losses = []
    shrink.zero_(model, plan)
    for seed in range(10):
        losses.append(_step(model, optimizer, 100 + seed, inputs))
        shrink.zero_(model, plan)
    return losses


def _twin(model: nn.Module, make: Make, optimizer: torch.optim.Optimizer) -> Any:
    other = copy.deepcopy(model)
    twin = make(other.parameters())
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return other, twin


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_the_next_ten_losses_are_those_of_masked_training(
    optimizer_name: str, inplace: bool
) -> None:
    _compare_losses("residual", OPTIMIZERS[optimizer_name], inplace)


@pytest.mark.parametrize(
    "name", ["depthwise, multiplier 3", "dense block", "grouped", "se, sigmoid", "conv1d",
             "prelu, a slope per channel", "transposed", "parameter of two modules", "flatten"]
)  # fmt: skip
def test_the_next_ten_losses_of_every_kind_of_layer(name: str) -> None:
    _compare_losses(name, OPTIMIZERS["adam"], True)


def _compare_losses(name: str, make: Make, inplace: bool) -> None:
    case = CASES[name]
    model = randomise(case.make()).train()
    optimizer = make(model.parameters())
    for seed in range(4):
        _step(model, optimizer, seed, case.inputs)
    plan = psap.plan(psap.trace(model, case.inputs), ratio=0.5)
    dense, twin = _twin(model, make, optimizer)
    result = psap.apply(model, plan, optimizer=optimizer, inplace=inplace)
    wanted = _masked_training(dense, twin, plan, case.inputs)
    assert result.optimizer is not None
    got = [_step(result.model, result.optimizer, 100 + seed, case.inputs) for seed in range(10)]
    assert got == pytest.approx(wanted, rel=1e-6)
    assert wanted[0] != wanted[-1]
    dense_parameters = dict(dense.named_parameters())
    for key, parameter in result.model.named_parameters():
        expected = shrink.gather(dense_parameters[key], plan.kept().get(key, {}))
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=1e-9)


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
    _step(model, optimizer, 0, (image(),))
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
    _step(model, optimizer, 0, (image(),))
    before, state = snapshot(model), copy.deepcopy(optimizer.state_dict())
    plan = psap.plan(psap.trace(model, image()), ratio=0.5)
    result = psap.apply(model, plan, optimizer=optimizer)
    assert result.optimizer is not None
    _step(result.model, result.optimizer, 1, (image(),))
    assert_same(before, snapshot(model))
    assert str(optimizer.state_dict()) == str(state)
    clone = torch.optim.Adam(result.model.parameters())
    clone.load_state_dict(result.optimizer.state_dict())


def test_an_optimizer_of_some_of_the_parameters() -> None:
    model = randomise(chain(8, 6)).train()
    optimizer = torch.optim.Adam(model[3].parameters())
    _step(model, optimizer, 0, (image(),))
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
    _step(result.model, result.optimizer, 0, (image(),))
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
        _step(model, optimizer, epoch, (image(),))
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
    _step(fresh.model, fresh.optimizer, 0, (image(),))
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
    _step(model, optimizer, 0, (image(),))
    plan = psap.plan(psap.trace(model, image()), ratio=0.5)
    result = psap.apply(model, plan, optimizer=optimizer)
    assert isinstance(result.optimizer, Own) and result.optimizer.rate == 0.25
    result.optimizer.entry = optimizer.entry  # functions are not taken over
    state = result.optimizer.state[result.model[0].weight]
    assert (state["count"], state["extra"], state["sum"].shape) == (1, {"a": [1, 2]}, (4, 3, 3, 3))
    _step(result.model, result.optimizer, 1, (image(),))


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
