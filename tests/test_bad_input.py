"""What a pruner is given by mistake: named errors, and nothing half done."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pruner_nets import CLASSES, NETS, OPTIMIZERS, Chain, backward, inputs, make, train
from torch import Tensor, nn

import psap


def build(model: Any, example: Any = None, opt: Any = None, **options: Any) -> psap.Pruner:
    example = inputs() if example is None else example
    opt = opt or torch.optim.SGD(model.parameters(), 0.1)
    return psap.Pruner(model, example, optimizer=opt, config=psap.Config(**options))


def hooks(opt: torch.optim.Optimizer) -> int:
    return len(opt._optimizer_step_pre_hooks) + len(opt._optimizer_step_post_hooks)


# Arguments


class Computed(nn.Module):
    """A forward that fails on its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("no such thing")


class Nothing(nn.Module):
    """The only layer makes the output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, CLASSES, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean((2, 3))


class Unknown(nn.Module):
    """Between the layers there is something that no rule follows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, CLASSES, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x).cumsum(1)).mean((2, 3))


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.LazyConv2d(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


MISTAKES: dict[str, tuple[Callable[[], Any], type[psap.PsapError], str]] = {
    "model type": (
        lambda: psap.Pruner("resnet", inputs(), optimizer=torch.optim.SGD([torch.ones(1)], 1)),
        psap.ArgumentTypeError,
        "model is a str; pass a torch.nn.Module",
    ),
    "model class": (
        lambda: psap.Pruner(Chain, inputs(), optimizer=torch.optim.SGD([torch.ones(1)], 1)),
        psap.ArgumentTypeError,
        "model is a type",
    ),
    "config type": (
        lambda: psap.Pruner(
            m := Chain(), inputs(), optimizer=torch.optim.SGD(m.parameters(), 1), config=0.3
        ),
        psap.ArgumentTypeError,
        "config is a float; pass psap.Config",
    ),
    "optimizer type": (
        lambda: build(Chain(), opt="sgd"),
        psap.ArgumentTypeError,
        "optimizer is a str",
    ),
    "optimizer of another model": (
        lambda: build(Chain(), opt=torch.optim.SGD(Chain().parameters(), 0.1)),
        psap.ArgumentError,
        "trains none of this model's parameters",
    ),
    "optimizer of a copy": (
        lambda: build(m := Chain(), opt=torch.optim.SGD(copy.deepcopy(m).parameters(), 0.1)),
        psap.ArgumentError,
        "trains none",
    ),
    "optimizer of two models": (
        lambda: build(
            m := Chain(), opt=torch.optim.SGD([*m.parameters(), nn.Parameter(torch.ones(1))], 1)
        ),
        psap.ArgumentError,
        "also trains 1 parameters of another model",
    ),
    "frozen": (
        lambda: build(Chain().requires_grad_(False), opt=torch.optim.SGD([torch.ones(1)], 1)),
        psap.StateError,
        "every parameter of the model is frozen",
    ),
    "inputs type": (
        lambda: build(Chain(), example=[[1.0]] and "x"),
        psap.ArgumentTypeError,
        "example_inputs is a str",
    ),
    "inputs mapping": (
        lambda: build(Chain(), example={"no such name": inputs()}),
        psap.TraceError,
        r"keyword argument 'no such name'; .* or \(batch,\) if it takes a dict",
    ),
    "inputs without tensor": (
        lambda: build(Chain(), example=(1, 2)),
        psap.ArgumentError,
        r"holds no tensor; .* such as torch.randn\(2, 3, 32, 32\), not its shape",
    ),
    "no inputs": (lambda: build(Chain(), example=()), psap.ArgumentError, "holds no tensor"),
    "empty input": (
        lambda: build(Chain(), example=torch.empty(0, 3, 8, 8)),
        psap.ArgumentError,
        "empty tensor",
    ),
    "shape": (
        lambda: build(Chain(), example=torch.ones(1, 4, 8, 8)),
        psap.TraceError,
        "failed on the example inputs in evaluation mode: RuntimeError",
    ),
    "dtype": (
        lambda: build(Chain(), example=inputs().long()),
        psap.TraceError,
        "failed on the example inputs",
    ),
    "device": (
        lambda: build(Chain(), example=inputs().to("meta")),
        psap.PsapError,
        "device|meta",
    ),
    "too many inputs": (
        lambda: build(Chain(), example=(inputs(), inputs())),
        psap.TraceError,
        "positional argument",
    ),
    "cannot run": (lambda: build(Computed()), psap.TraceError, "RuntimeError: no such thing"),
    "lazy": (
        lambda: build(m := Lazy(), opt=torch.optim.SGD(m.parameters(), 0.1)),
        psap.ArgumentError,
        "conv.weight is not initialised",
    ),
    "nothing to prune": (
        lambda: build(Nothing()),
        psap.TargetError,
        "no layer of this model can be pruned: conv: output of the model",
    ),
    "nothing that can be followed": (
        lambda: build(Unknown()),
        psap.TargetError,
        "no layer of this model can be pruned: .*cumsum",
    ),
    "unreachable": (
        lambda: build(Chain(), target=psap.Target(macs=0.01)),
        psap.TargetError,
        "cannot be met: the smallest network that these limits allow keeps .*%",
    ),
    "unreachable by min_channels": (
        lambda: build(Chain(), target=psap.Target(macs=0.5), min_channels=8),
        psap.TargetError,
        "cannot be met.*lower min_channels",
    ),
    "unreachable by max_ratio": (
        lambda: build(Chain(), target=psap.Target(parameters=0.5), max_ratio=0.0),
        psap.TargetError,
        "cannot be met.*raise max_ratio",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_mistakes_are_named(mistake: str) -> None:
    call, error, message = MISTAKES[mistake]
    with pytest.raises(error, match=message) as info:
        call()
    assert isinstance(info.value, psap.PsapError)
    if error is psap.ArgumentError or error is psap.TargetError:
        assert isinstance(info.value, ValueError)
    if error is psap.ArgumentTypeError:
        assert isinstance(info.value, TypeError)


@pytest.mark.filterwarnings(r"ignore:finish\(\) makes up:psap.PsapWarning")
def test_a_constructor_that_fails_leaves_model_and_optimizer_as_they_were() -> None:
    model = Chain().train()
    model.bn1.eval()
    opt = OPTIMIZERS["sgd"](model.parameters())
    backward(model, opt, 0)
    opt.step()
    before = copy.deepcopy((model.state_dict(), opt.state_dict()))
    for options in ({"target": psap.Target(macs=0.001)}, {"min_channels": 99}):
        with pytest.raises(psap.TargetError, match="cannot be met"):
            build(model, opt=opt, **options)
    assert hooks(opt) == 0
    assert all(torch.equal(t, before[0][n]) for n, t in model.state_dict().items())
    assert str(opt.state_dict()) == str(before[1])
    assert model.training and not model.bn1.training
    build(model, opt=opt, target=psap.Target(macs=0.5)).finish()  # and then it works


@pytest.mark.filterwarnings(r"ignore:finish\(\) makes up:psap.PsapWarning")
def test_two_pruners_on_one_optimizer_are_refused() -> None:
    model, opt, pruner = make("chain")
    with pytest.raises(psap.StateError, match=r"another Pruner already works on this optimizer"):
        psap.Pruner(model, inputs(), optimizer=opt)
    assert hooks(opt) == 2
    train(model, opt, pruner, epochs=3)
    result = pruner.finish(inplace=True)
    again = psap.Pruner(model, inputs(), optimizer=opt, config=psap.Config(prune_steps=1))
    assert again.finish().plan.before == result.plan.after
    other = torch.optim.Adam(model.parameters())
    psap.Pruner(model, inputs(), optimizer=other)


# The course of a run


@pytest.mark.parametrize("inplace", [False, True])
def test_after_finish(inplace: bool) -> None:
    model, opt, pruner = make("chain")
    train(model, opt, pruner, epochs=3)
    assert hooks(opt) == 2
    result = pruner.finish(inplace=inplace)
    assert hooks(opt) == hooks(result.optimizer) == (not inplace)  # each looks out for the old one
    with pytest.raises(psap.StateError, match=r"finish\(\) was already called"):
        pruner.finish()
    with pytest.raises(psap.StateError, match=r"step\(\) after finish\(\)"):
        pruner.step()
    assert isinstance(psap.StateError(""), RuntimeError)
    if not inplace:  # the dense network may go on, but that is hardly what is wanted
        with pytest.warns(psap.PsapWarning, match="trains the old network"):
            opt.step()
    for net, optimizer in ((model, opt), (result.model, result.optimizer)):
        before = net.conv1.weight.detach().clone()
        train(net, optimizer, iterations=2)
        assert not torch.equal(net.conv1.weight, before)
    assert pruner.done
    kinds = [e["kind"] for e in result.report["events"]]
    assert kinds == ["prune", "window", "prune", "window", "prune"]  # none after the last one
    assert result.report["config"]["target"]["macs"] == 0.4


@pytest.mark.parametrize("inplace", [False, True])
def test_a_finish_that_fails_leaves_everything_usable(
    inplace: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, opt, pruner = make("residual", protect="pulse")
    train(model, opt, pruner, epochs=4)
    parameters = [(p, p.data_ptr(), p.shape) for p in model.parameters()]
    before = copy.deepcopy((model.state_dict(), opt.state_dict()))

    def fail(*_: Any, **__: Any) -> None:
        raise psap.VerificationError("it differs")

    with monkeypatch.context() as patch:
        patch.setattr("psap.shrink.verify", fail)
        with pytest.raises(psap.VerificationError, match="it differs"):
            pruner.finish(inplace=inplace)
    assert [(p, p.data_ptr(), p.shape) for p in model.parameters()] == parameters
    assert all(torch.equal(t, before[0][n]) for n, t in model.state_dict().items())
    assert hooks(opt) == 2 and pruner.done
    pruner.step()
    train(model, opt, iterations=2)
    result = pruner.finish(inplace=inplace)
    assert result.plan.after.macs <= 0.4 * result.plan.before.macs


class Fixed(nn.Module):
    """A forward that writes a width down: only graph mode can shrink it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, CLASSES, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).relu()
        return self.conv2(x.view(-1, 8, 8, 8)).mean((2, 3))


@pytest.mark.filterwarnings(r"ignore:finish\(\) makes up:psap.PsapWarning")
@pytest.mark.parametrize("inplace", [False, True])
def test_sizes_that_are_fixed_in_forward(inplace: bool) -> None:
    model = Fixed()
    opt = torch.optim.SGD(model.parameters(), 0.1)
    pruner = build(model, opt=opt, target=psap.Target(macs=0.5))
    result = pruner.finish(inplace=inplace)
    assert result.mode == "graph" and (result.model is model) is inplace
    assert result.model.conv1.weight.shape[0] < 8
    assert result.plan.after.macs <= 0.5 * result.plan.before.macs


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("protect", ["gate", "pulse"])
@pytest.mark.filterwarnings(r"ignore:step\(\) was called:psap.PsapWarning")
@pytest.mark.filterwarnings(r"ignore:finish\(\) makes up:psap.PsapWarning")
def test_a_weight_that_is_not_finite_stops_the_step(value: float, protect: str) -> None:
    model, opt, pruner = make("chain", protect=protect, interval=2)
    train(model, opt, pruner)
    train(model, opt, pruner)
    backup = model.conv2.weight.detach().clone()
    masks, events = pruner.masks(), list(pruner.events)
    with torch.no_grad():
        model.conv2.weight[3, 1, 0, 2] = value
        model.conv2.weight[4, 0, 0, 0] = value
    state = copy.deepcopy(model.state_dict())
    for call in (pruner.step, pruner.finish):  # the third call is due
        with pytest.raises(psap.PsapError, match=r"conv2.weight holds 2 values that are not fin"):
            call()
    now = model.state_dict()
    assert all(torch.equal(t.nan_to_num(7), state[n].nan_to_num(7)) for n, t in now.items())
    assert all(torch.equal(pruner.masks()[n], m) for n, m in masks.items())
    assert pruner.events == events
    with torch.no_grad():
        model.conv2.weight.copy_(backup)
    pruner.step()  # it is still due
    assert pruner.events[-1].step == 2 and pruner.events[-1].call == 3


def test_gradients_that_are_not_finite_do_not_reach_pruned_channels() -> None:
    model, opt, pruner = make("chain")
    train(model, opt, pruner, epochs=3)
    assert pruner.done
    dead = torch.nonzero(~pruner.masks()["conv1"]).flatten().tolist()
    backward(model, opt, 0)
    model.conv1.weight.grad.fill_(float("nan"))
    opt.step()
    assert not model.conv1.weight.detach()[dead].any()
    assert model.conv1.weight.isnan().any()


def test_a_model_without_batch_norm() -> None:
    for protect in ("gate", "pulse", "none"):
        model, opt, pruner = make("plain", protect=protect)
        losses = train(model, opt, pruner, epochs=4)
        assert all(loss < 10 for loss in losses)
        small = pruner.finish().model
        with torch.no_grad():
            torch.testing.assert_close(small(inputs()), model(inputs()), rtol=1e-5, atol=1e-6)


def test_a_target_of_one_prunes_nothing() -> None:
    model, opt, pruner = make("residual", target=psap.Target(macs=1.0), protect="pulse")
    train(model, opt, pruner, epochs=4)
    result = pruner.finish()
    assert pruner.done
    assert result.plan.sides == ()
    assert result.plan.after == result.plan.before
    twin = NETS["residual"]()
    torch.manual_seed(0)
    twin = NETS["residual"]().train()
    train(twin, OPTIMIZERS["sgd"](twin.parameters()), epochs=4)
    for a, b in zip(result.model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings(r"ignore:step\(\) was called:psap.PsapWarning")
def test_a_run_without_gradients_or_with_parameters_that_never_get_one() -> None:
    model, opt, pruner = make("chain", protect="pulse", window=2)
    pruner.step()
    opt.zero_grad()
    opt.step()  # no gradient at all
    opt.step()
    event = pruner.events[-1]
    assert (event.observed, event.skipped) == (0, 2)
    for parameter in model.bn1.parameters():
        parameter.requires_grad_(False)  # frozen half way
    train(model, opt, pruner, epochs=3)
    pruner.finish()
