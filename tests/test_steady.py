"""Parameters that are replaced or converted while a pruner works on them are named at once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pruner_nets import Chain, inputs, labels, make, train
from torch import nn
from torch.nn import functional as F

import psap


def step(model: nn.Module, opt: torch.optim.Optimizer) -> None:
    """One training step in the dtype that the model has now."""
    opt.zero_grad()
    F.cross_entropy(model(inputs(dtype=model.conv1.weight.dtype)), labels()).backward()
    opt.step()


CONVERSIONS: dict[str, tuple[Callable[[Chain], Any], str]] = {
    "double": (lambda m: m.double(), "float64"),
    "half": (lambda m: m.bfloat16(), "bfloat16"),
    "a part": (lambda m: m.to(torch.float64), "float64"),
}


@pytest.mark.parametrize("protect", ["gate", "pulse", "none"])
@pytest.mark.parametrize("kind", CONVERSIONS)
def test_a_conversion_is_refused_and_can_be_taken_back(kind: str, protect: str) -> None:
    model, opt, pruner = make("chain", optimizer="adam", prune_steps=3, protect=protect)
    train(model, opt, pruner)
    convert, now = CONVERSIONS[kind]
    convert(model)
    message = rf"\w+ was torch.float32 .* is torch.{now} now .*model.to\(torch.float32\)"
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(psap.StateError, match=message):
        step(model, opt)
    for call in (pruner.step, pruner.finish):
        with pytest.raises(psap.StateError, match=message):
            call()
    after = model.state_dict()
    for name in ("conv1.weight", "bn2.weight", "head.fc.bias"):
        assert torch.equal(before[name], after[name])  # nothing was trained or put back
    model.to(torch.float32)
    train(model, opt, pruner, epochs=2)
    assert pruner.finish().plan.sides


def test_one_parameter_among_many_is_enough() -> None:
    model, opt, pruner = make("chain", prune_steps=3)
    train(model, opt, pruner)
    model.bn2.bias.data = model.bn2.bias.data.double()
    with pytest.raises(psap.StateError, match=r"^bn2.bias was torch.float32 .* now, which"):
        opt.step()
    model.bn2.bias.data = model.bn2.bias.data.float()
    model.bn1.running_mean = model.bn1.running_mean.double()
    with pytest.raises(psap.StateError, match=r"^bn1.running_mean was torch.float32"):
        pruner.step()
    del model.bn1.running_mean
    with pytest.raises(psap.StateError, match=r"^the buffer bn1.running_mean is gone"):
        pruner.step()


@pytest.mark.parametrize("protect", ["gate", "none"])
def test_before_the_first_and_after_the_last_prune_step_nothing_is_saved(protect: str) -> None:
    model, opt, pruner = make("chain", prune_steps=1, protect=protect)
    model.double()
    step(model, opt)
    pruner.step()
    model.float()
    step(model, opt)
    assert pruner.finish().model.conv1.weight.dtype == torch.float32


def _assign(model: Chain) -> None:
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


def _module(model: Chain) -> None:
    model.head = copy.deepcopy(model.head)


def _parameter(model: Chain) -> None:
    model.conv2.weight = nn.Parameter(model.conv2.weight.detach().clone())


REPLACEMENTS: dict[str, tuple[Callable[[Chain], None], str]] = {
    "load_state_dict(assign=True)": (_assign, r"conv1.weight is another .* \(and so for 7 more\)"),
    "a module": (_module, r"head.fc.weight is another tensor .* \(and so for 1 more\)"),
    "a parameter": (_parameter, r"conv2.weight is another tensor since the Pruner was made: the"),
    "no module": (lambda m: setattr(m, "head", nn.Identity()), r"head.fc.weight is gone since"),
}


@pytest.mark.parametrize("epochs", [0, 1, 3])
@pytest.mark.parametrize("kind", REPLACEMENTS)
def test_what_is_replaced_is_named(kind: str, epochs: int) -> None:
    model, opt, pruner = make("chain", prune_steps=3)
    state = pruner.state_dict()
    for _ in range(epochs):
        train(model, opt, pruner)
    replace, message = REPLACEMENTS[kind]
    replace(model)
    for call in (pruner.step, pruner.finish, lambda: pruner.load_state_dict(state)):
        with pytest.raises(psap.StateError, match=message):
            call()


def test_a_step_names_what_was_replaced() -> None:
    model, opt, pruner = make("chain", prune_steps=3)
    train(model, opt, pruner)
    _assign(model)
    with pytest.raises(psap.StateError, match=r"assign=False\); or make a new optimizer and a new"):
        step(model, opt)


def test_a_model_that_was_cut_meanwhile_is_refused() -> None:
    model, opt, pruner = make("chain", prune_steps=3)
    train(model, opt, pruner)
    psap.apply(model, psap.plan(psap.trace(model, inputs()), ratio=0.5), inplace=True)
    with pytest.raises(psap.StateError, match=r"conv1.weight had shape \(8, 3, 3, 3\) and has \(4"):
        pruner.step()
