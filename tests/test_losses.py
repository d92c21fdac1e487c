"""After a shrink in the middle of training the losses are those of masked training, float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import chain, image, randomise, train_step
from torch import Tensor, nn
from zoo import CASES

import psap
from psap import shrink

Make = Callable[[Any], torch.optim.Optimizer]


class Lamb(torch.optim.Optimizer):
    """LAMB (You et al., arXiv 1904.00962): Adam, scaled per tensor by two norms."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-6, "decay": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            a, b = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(step=0, mean=torch.zeros_like(p), square=torch.zeros_like(p))
                state["step"] += 1
                state["mean"].lerp_(p.grad, 1 - a)
                state["square"].lerp_(p.grad**2, 1 - b)
                mean = state["mean"] / (1 - a ** state["step"])
                square = state["square"] / (1 - b ** state["step"])
                update = mean / (square.sqrt() + group["eps"]) + group["decay"] * p
                norms = float(p.norm()), float(update.norm())
                p.sub_(update, alpha=group["lr"] * (norms[0] / norms[1] if all(norms) else 1.0))


BAR: dict[str, Make] = {
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=0.002, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.002),
    "lamb": lambda p: Lamb(p, lr=0.01),
}
OPTIMIZERS: dict[str, Make] = {
    **BAR,
    "sgd": lambda p: torch.optim.SGD(p, lr=0.002),
    "sgd dampening": lambda p: torch.optim.SGD(p, lr=0.002, momentum=0.9, dampening=0.3),
    "sgd nesterov": lambda p: torch.optim.SGD(p, lr=0.002, momentum=0.9, nesterov=True),
    "adam foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "adamw amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True, weight_decay=0.1),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.002),
    "rmsprop centered": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.5),
}


@torch.no_grad()
def _erase(model: nn.Module, optimizer: torch.optim.Optimizer, plan: psap.Plan) -> None:
    """Zero what the plan removes, what reads it, and all state of both.

    A norm over a whole tensor, as in LAMB, is that of the small tensor only then.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for side in plan.sides:
        tensor = tensors[side.name]
        gone = torch.tensor([i for i in range(side.size) if i not in set(side.kept)])
        tensor.index_fill_(side.dim, gone, 0)
        for value in optimizer.state.get(tensor, {}).values():
            if isinstance(value, Tensor) and value.shape == tensor.shape:
                value.index_fill_(side.dim, gone, 0)


def _masked_training(
    model: nn.Module, optimizer: torch.optim.Optimizer, plan: psap.Plan, inputs: Any
) -> list[float]:
    """Ten steps of the dense net; what was pruned is put back to zero after every step."""

    def mask() -> None:
        if isinstance(optimizer, Lamb):
            _erase(model, optimizer, plan)
        else:  # an optimizer that works on single weights needs no more than the masks
            shrink.zero_(model, plan)

    losses = []
    mask()
    for seed in range(10):
        losses.append(train_step(model, optimizer, 100 + seed, inputs))
        mask()
    return losses


def _twin(model: nn.Module, make: Make, optimizer: torch.optim.Optimizer, with_frozen: bool) -> Any:
    other = copy.deepcopy(model)
    twin = make(other.parameters() if with_frozen else _trained(other))
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return other, twin


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _compare_losses(
    model: nn.Module,
    inputs: Any,
    make: Make,
    *,
    inplace: bool = False,
    mode: str = "module",
    with_frozen: bool = False,
) -> psap.Result:
    """Train, shrink, train on, beside masked training; every parameter must agree and move."""
    model.train()
    optimizer = make(model.parameters() if with_frozen else _trained(model))
    for seed in range(4):
        train_step(model, optimizer, seed, inputs)
    plan = psap.plan(psap.trace(model, inputs), ratio=0.5)
    dense, twin = _twin(model, make, optimizer, with_frozen)
    result = psap.apply(model, plan, optimizer=optimizer, inplace=inplace)
    assert result.optimizer is not None and result.mode == mode
    first = {name: p.detach().clone() for name, p in result.model.named_parameters()}
    wanted = _masked_training(dense, twin, plan, inputs)
    got = [train_step(result.model, result.optimizer, 100 + seed, inputs) for seed in range(10)]
    assert got == pytest.approx(wanted, rel=1e-6)
    assert wanted[0] != wanted[-1]
    dense_parameters = dict(dense.named_parameters())
    for key, parameter in result.model.named_parameters():
        expected = shrink.gather(dense_parameters[key], plan.kept().get(key, {}))
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=1e-9)
        if not parameter.requires_grad:
            assert torch.equal(parameter, first[key]), key
        elif parameter.grad.abs().max() > 1e-12:  # a bias before a norm only has rounding errors
            assert not torch.equal(parameter, first[key]), key
    return result


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_next_ten_losses_are_those_of_masked_training(optimizer: str, inplace: bool) -> None:
    model = randomise(CASES["residual"].make())
    _compare_losses(model, (image(),), OPTIMIZERS[optimizer], inplace=inplace)


@pytest.mark.parametrize("optimizer", BAR)
def test_the_next_ten_losses_in_graph_mode(optimizer: str) -> None:
    model = randomise(CASES["padded shortcut"].make())
    _compare_losses(model, (image(),), BAR[optimizer], mode="graph")


@pytest.mark.parametrize(
    "name", ["depthwise, multiplier 3", "dense block", "grouped", "se, sigmoid", "conv1d",
             "prelu, a slope per channel", "transposed", "parameter of two modules", "flatten"]
)  # fmt: skip
def test_the_next_ten_losses_of_every_kind_of_layer(name: str) -> None:
    case = CASES[name]
    _compare_losses(randomise(case.make()), case.inputs, OPTIMIZERS["adam"], inplace=True)


@pytest.mark.parametrize("name", ["slices", "fixed view", "cross stage", "depthwise in forward"])
def test_the_next_ten_losses_of_every_kind_of_program(name: str) -> None:
    case = CASES[name]
    _compare_losses(randomise(case.make()), case.inputs, OPTIMIZERS["adam"], mode="graph")


@pytest.mark.parametrize("optimizer", BAR)
@pytest.mark.parametrize("with_frozen", [False, True])
def test_frozen_parameters_stay_and_the_rest_trains(optimizer: str, with_frozen: bool) -> None:
    model = randomise(chain(8, 6, 10))
    model[3].requires_grad_(False)  # its filters and what it reads: the first two groups
    result = _compare_losses(model, (image(),), BAR[optimizer], with_frozen=with_frozen)
    widths = [m.out_channels for m in result.model if isinstance(m, nn.Conv2d)]
    assert widths == [8, 6, 5]
    assert not result.model[3].weight.requires_grad
    groups = result.optimizer.param_groups  # type: ignore[union-attr]
    assert len(groups[0]["params"]) == len(list(result.model.parameters())) - (not with_frozen)
