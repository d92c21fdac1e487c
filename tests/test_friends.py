"""Schedulers, scalers, averaged copies and further optimizers through a shrink."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from nets import assert_exact, assert_same, chain, image, randomise, snapshot, train_step
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn
from zoo import CASES

import psap
from psap import commit, shrink

SCHEDULERS: dict[str, Any] = {
    "step": lambda o: lr_scheduler.StepLR(o, 2, gamma=0.5),
    "multi step": lambda o: lr_scheduler.MultiStepLR(o, [3, 7], gamma=0.5),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.02, total_steps=20),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.02, step_size_up=3, cycle_momentum=False),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=1.0),
    "swa": lambda o: SWALR(o, 0.001, anneal_epochs=6),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 3), lr_scheduler.CosineAnnealingLR(o, 5)], [3]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 4), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


def _adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01)


def _advance(scheduler: Any, loss: float) -> None:
    scheduler.step(*([loss] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))


def _plan(model: nn.Module, inputs: Any = None) -> psap.Plan:
    return psap.plan(psap.trace(model, image() if inputs is None else inputs), ratio=0.5)


def _scheduled(name: str, steps: int) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    model = randomise(chain(8, 6)).train()
    optimizer = _adam(model)
    scheduler = SCHEDULERS[name](optimizer)
    for seed in range(steps):
        _advance(scheduler, train_step(model, optimizer, seed, (image(),)))
    return model, optimizer, scheduler


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("steps", [0, 4])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_go_on(name: str, steps: int, inplace: bool) -> None:
    (model, optimizer, scheduler), twin = (_scheduled(name, steps) for _ in range(2))
    old = copy.deepcopy(scheduler.state_dict())
    result = psap.apply(
        model, _plan(model), optimizer=optimizer, friends=[scheduler], inplace=inplace
    )
    (fresh,) = result.friends
    assert type(fresh) is type(scheduler) and (fresh is scheduler) is inplace
    assert fresh.optimizer is result.optimizer
    rates = []
    for small, trained, schedule in ((result.model, result.optimizer, fresh), twin):
        rates.append([])
        for seed in range(6):
            train_step(small, trained, 50 + seed, (image(),))
            _advance(schedule, 1.0)
            rates[-1].append([group["lr"] for group in trained.param_groups])
    assert rates[0] == rates[1] and rates[0][0] != rates[0][-1]
    if not inplace:
        assert str(scheduler.state_dict()) == str(old)  # and the old one schedules on for itself
        train_step(model, optimizer, 9, (image(),))
        _advance(scheduler, 1.0)
        assert [group["lr"] for group in optimizer.param_groups] == rates[0][0]


def test_a_scheduler_of_another_library() -> None:
    class Halving:
        """What timm's schedulers are, too: an object with an optimizer."""

        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

        def step(self) -> None:
            for group in self.optimizer.param_groups:
                group["lr"] /= 2

    model = randomise(chain(8, 6)).train()
    optimizer = _adam(model)
    result = psap.apply(model, _plan(model), optimizer=optimizer, friends=[Halving(optimizer)])
    result.friends[0].step()
    assert result.optimizer is not None
    assert [o.param_groups[0]["lr"] for o in (optimizer, result.optimizer)] == [0.01, 0.005]


# Averaged copies


def _averaged(model: nn.Module, use_buffers: bool = True) -> AveragedModel:
    average = get_ema_multi_avg_fn(0.7)
    return AveragedModel(model, multi_avg_fn=average, use_buffers=use_buffers)


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize(
    ("case", "inplace"),
    [("residual", False), ("residual", True), ("se, sigmoid", True), ("padded shortcut", False),
     ("padded shortcut", True), ("fixed view", False)],
)  # fmt: skip
def test_averaged_copies_average_on(case: str, inplace: bool, use_buffers: bool) -> None:
    """The small average is at every step the kept part of the average of masked training."""
    model = randomise(CASES[case].make()).train()
    optimizer, average = _adam(model), _averaged(model, use_buffers)
    for seed in range(4):
        train_step(model, optimizer, seed, (image(),))
        average.update_parameters(model)
    plan = _plan(model)
    dense, twin, mean = copy.deepcopy((model, optimizer, average))
    result = psap.apply(model, plan, optimizer=optimizer, friends=[average], inplace=inplace)
    (small,) = result.friends
    assert (small is average) is inplace and isinstance(small, AveragedModel)
    assert int(small.n_averaged) == 4
    if not inplace:
        assert_exact(average.module, plan, small.module, (image(),))
    shrink.zero_(dense, plan)
    for seed in range(3):
        for net, trained, averaged in (
            (dense, twin, mean),
            (result.model, result.optimizer, small),
        ):
            train_step(net, trained, 100 + seed, (image(),))  # type: ignore[arg-type]
            shrink.zero_(dense, plan)
            averaged.update_parameters(net)
    kept = plan.kept()
    wanted = {**dict(mean.module.named_parameters()), **dict(mean.module.named_buffers())}
    got = {**dict(small.module.named_parameters()), **dict(small.module.named_buffers())}
    assert wanted.keys() == got.keys()
    for name, tensor in got.items():
        expected = shrink.gather(wanted[name], kept.get(name, {}))
        torch.testing.assert_close(tensor.detach(), expected, rtol=1e-6, atol=1e-9)
    small.eval()(image())


def test_a_copy_keeps_what_is_its_own() -> None:
    """Dtype, train flags, frozen parameters: those of the copy, not of the model."""
    model = randomise(chain(8, 6)).train()
    other = copy.deepcopy(model).eval().requires_grad_(False).float()
    plan = _plan(model)
    result = psap.apply(model, plan, friends=[other, nn.Sequential(nn.Flatten(), other)])
    small, wrapped = result.friends
    assert wrapped[1] is small and result.model is not small
    assert small[0].weight.shape == (4, 3, 3, 3) and small[0].out_channels == 4
    assert small[0].weight.dtype == torch.float32 and result.model[0].weight.dtype == torch.float64
    assert not small.training and not any(p.requires_grad for p in small.parameters())
    assert result.model.training and other[0].weight.shape == (8, 3, 3, 3)


# Scalers and further optimizers


@pytest.mark.parametrize("inplace", [False, True])
def test_a_scaler_goes_on(inplace: bool) -> None:
    model = randomise(chain(8, 6)).float().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    x = image().float()

    def step(net: nn.Module, trained: Any, scaling: Any) -> None:
        trained.zero_grad()
        scaling.scale(net(x).square().mean()).backward()
        scaling.step(trained)
        scaling.update()

    for _ in range(2):
        step(model, optimizer, scaler)
    result = psap.apply(
        model, _plan(model, x), optimizer=optimizer, friends=(scaler,), inplace=inplace
    )
    (fresh,) = result.friends
    assert (fresh is scaler) is inplace and fresh.get_scale() == 1024.0
    first = result.model[0].weight.detach().clone()
    step(result.model, result.optimizer, fresh)
    assert fresh.get_scale() == 2048.0  # the third good step in a row
    assert not torch.equal(first, result.model[0].weight)
    if not inplace:
        assert scaler.get_scale() == 1024.0


def test_a_scaler_in_the_middle_of_a_step() -> None:
    model = randomise(chain(8, 6)).float().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(image().float()).square().mean()).backward()
    scaler.unscale_(optimizer)
    before = snapshot(model)
    plan = _plan(model, image().float())
    with pytest.raises(psap.PsapError, match=r"GradScaler among the friends .* two training steps"):
        psap.apply(model, plan, optimizer=optimizer, friends=[scaler])
    assert_same(before, snapshot(model))
    psap.apply(model, plan, optimizer=optimizer, friends=[scaler], inplace=True)
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("inplace", [False, True])
def test_several_optimizers(inplace: bool) -> None:
    model = randomise(chain(8, 6)).train()
    body = torch.optim.SGD(list(model.parameters())[:-2], lr=0.002, momentum=0.9)
    tail = torch.optim.Adam(list(model.parameters())[-2:], lr=0.01)
    schedules = [lr_scheduler.StepLR(o, 1, gamma=0.5) for o in (body, tail)]
    for seed in range(3):
        train_step(model, body, seed, (image(),))
        tail.step()
    result = psap.apply(
        model, _plan(model), optimizer=body, friends=[tail, *schedules], inplace=inplace
    )
    other, *fresh = result.friends
    assert (other is tail) is inplace and isinstance(other, torch.optim.Adam)
    assert [s.optimizer for s in fresh] == [result.optimizer, other]
    assert other.state[result.model[-1][-1].weight]["exp_avg"].shape == (5, 3)
    before = {n: p.detach().clone() for n, p in result.model.named_parameters()}
    train_step(result.model, result.optimizer, 9, (image(),))  # type: ignore[arg-type]
    other.step()
    for name, parameter in result.model.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_optimizers_may_all_be_friends() -> None:
    model = randomise(chain(8, 6)).train()
    optimizer = _adam(model)
    schedule = lr_scheduler.StepLR(optimizer, 1)
    result = psap.apply(model, _plan(model), friends=[schedule, optimizer])
    assert result.optimizer is None
    assert result.friends[0].optimizer is result.friends[1] is not optimizer


def test_a_pruner_hands_them_on() -> None:
    model = randomise(chain(8, 6)).train()
    optimizer, average = _adam(model), _averaged(model)
    schedule = lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    config = psap.Config(target=psap.Target(macs=0.5), prune_steps=1)
    pruner = psap.Pruner(model, image(), optimizer=optimizer, config=config)
    train_step(model, optimizer, 0, (image(),))
    pruner.step()
    result = pruner.finish(friends=[schedule, average])
    fresh, small = result.friends
    assert fresh.optimizer is result.optimizer
    assert_exact(average.module, result.plan, small.module, (image(),))


# All or nothing


class _Fault(Exception):
    """Put in on purpose."""


def _training() -> tuple[nn.Module, torch.optim.Optimizer, AveragedModel, Any]:
    model = randomise(chain(8, 6)).train()
    optimizer, average = _adam(model), _averaged(model)
    train_step(model, optimizer, 0, (image(),))
    average.update_parameters(model)
    return model, optimizer, average, lr_scheduler.StepLR(optimizer, 1)


def _refusals(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[Any, str]]:
    other = randomise(chain(8, 7))
    foreign = torch.optim.SGD(other.parameters(), lr=0.1)
    factored = torch.optim.Adafactor(model.parameters(), lr=0.0)
    factored.step()
    return {
        "not a list": (AveragedModel(model), "friends is a AveragedModel; pass a list of"),
        "text": ("ema", "friends is a str; pass a list of"),
        "a number": ([3], r"friends\[0\] is a int; pass another optimizer"),
        "a dict": ([{}], r"friends\[0\] is a dict"),
        "another model": ([other], r"friends\[0\], a Sequential, holds no copy of the model"),
        "the model": ([model], r"friends\[0\] is or wraps the model itself"),
        "around the model": ([nn.Sequential(model)], r"friends\[0\] is or wraps the model itself"),
        "a foreign optimizer": ([foreign], "trains none of this model's parameters"),
        "a foreign schedule": (
            [lr_scheduler.StepLR(foreign, 1)],
            r"friends\[0\], a StepLR, works on an optimizer that was not given",
        ),
        "no optimizer": ([lambda: 0], r"friends\[0\] is a function; pass"),
        "state that cannot be cut": ([factored], "keeps 'row_var' of shape"),
    }


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", _refusals(*_training()[:2]))
def test_what_is_refused_changes_nothing(name: str, inplace: bool) -> None:
    model, optimizer, average, schedule = _training()
    given, match = _refusals(model, optimizer)[name]
    if isinstance(given, list):
        given = [average, schedule, *given]
        match = match.replace("[0", "[2")
    before = snapshot(model), snapshot(average), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(psap.PsapError, match=match):
        psap.apply(model, _plan(model), optimizer=optimizer, friends=given, inplace=inplace)
    assert_same(before[0], snapshot(model))
    assert_same(before[1], snapshot(average))
    assert str(before[2]) == str(optimizer.state_dict())


@pytest.mark.parametrize("at", [1, 5, 13, 20, 25])
def test_a_commit_that_fails_in_a_copy_is_undone(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, average, schedule = _training()
    plan, inner, calls = _plan(model), commit._set, 0
    before = snapshot(model), snapshot(average), copy.deepcopy(optimizer.state_dict())

    def set_(tensor: Tensor, data: Tensor, grad: Any) -> None:
        nonlocal calls
        calls += 1
        inner(tensor, data, grad)
        if calls == at:
            raise _Fault("injected")

    monkeypatch.setattr(commit, "_set", set_)
    with pytest.raises(_Fault, match="injected"):
        psap.apply(model, plan, optimizer=optimizer, friends=[average, schedule], inplace=True)
    assert calls == 2 * at
    assert_same(before[0], snapshot(model))
    assert_same(before[1], snapshot(average))
    assert str(before[2]) == str(optimizer.state_dict())
    train_step(model, optimizer, 1, (image(),))
    average.update_parameters(model)


@pytest.mark.zoo
@pytest.mark.parametrize("inplace", [False, True])
def test_the_average_of_timm(inplace: bool) -> None:
    from timm.scheduler import CosineLRScheduler
    from timm.utils import ModelEmaV3

    model = randomise(CASES["residual"].make()).train()
    optimizer = _adam(model)
    average, schedule = ModelEmaV3(model, decay=0.7), CosineLRScheduler(optimizer, 10)
    for seed in range(3):
        train_step(model, optimizer, seed, (image(),))
        average.update(model)
        schedule.step(seed)
    plan = _plan(model)
    dense = copy.deepcopy(average)
    result = psap.apply(
        model, plan, optimizer=optimizer, friends=[average, schedule], inplace=inplace
    )
    small, fresh = result.friends
    assert fresh.optimizer is result.optimizer and (small is average) is inplace
    assert_exact(dense.module, plan, small.module, (image(),))
    train_step(result.model, result.optimizer, 9, (image(),))  # type: ignore[arg-type]
    wanted = {k: v.clone().lerp_(result.model.state_dict()[k], 0.3) if v.is_floating_point() else v
              for k, v in small.module.state_dict().items()}  # fmt: skip
    small.update(result.model)
    for name, tensor in small.module.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, wanted[name])
    fresh.step(4)
    assert result.optimizer.param_groups[0]["lr"] < 0.01  # type: ignore[union-attr]
