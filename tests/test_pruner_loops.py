"""Ways to train that are not the plain loop, and models that are not plain."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from pruner_nets import NETS, OPTIMIZERS, Chain, backward, inputs, labels, make, train
from torch import nn
from torch.nn import functional as F

import psap


@pytest.mark.filterwarnings(r"ignore:step\(\) was called:psap.PsapWarning")
def test_scaler_that_skips_steps() -> None:
    model, opt, pruner = make("chain", protect="pulse")
    pruner.step()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = copy.deepcopy(model.state_dict())
    loss = F.cross_entropy(model.eval()(inputs()), labels()) * float("inf")
    scaler.scale(loss).backward()
    scaler.step(opt)
    scaler.update()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert (pruner._window.observed, pruner._left, pruner._iteration) == (0, 3, 0)
    model.train()
    for i in range(3):
        opt.zero_grad()
        scaler.scale(F.cross_entropy(model(inputs(seed=i)), labels(seed=i))).backward()
        scaler.step(opt)
        scaler.update()
    assert pruner.events[-1].observed == 3


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.filterwarnings(r"ignore:step\(\) was called:psap.PsapWarning")
def test_the_scale_of_the_loss_is_taken_out(fused: bool) -> None:
    sums = []
    for enabled in (True, False):
        torch.manual_seed(0)
        model = Chain()
        opt = torch.optim.AdamW(model.parameters(), 1e-3, fused=fused)
        config = psap.Config(protect="pulse")
        pruner = psap.Pruner(model, inputs(), optimizer=opt, config=config)
        pruner.step()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=enabled)
        scaler.scale(F.cross_entropy(model(inputs()), labels())).backward()
        scaler.step(opt)
        sums.append(pruner._window.sums[0])
    assert sums[1].abs().max() > 1e-4
    np.testing.assert_allclose(sums[0], sums[1], rtol=1e-4, atol=1e-8)


def test_a_closure_is_supervised_once_per_step() -> None:
    model, opt, pruner = make("chain", protect="pulse")
    twin, other, wanted = make("chain", protect="pulse")
    for i in range(3):
        if i == 1:
            pruner.step(), wanted.step()
        opt.step(lambda i=i: torch.tensor(backward(model, opt, i)))
        backward(twin, other, i)
        other.step()
    np.testing.assert_array_equal(pruner._window.sums, wanted._window.sums)
    assert pruner._window.observed == wanted._window.observed == 2
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
    opt.step(closure=lambda: torch.tensor(backward(model, opt, 9)))
    assert pruner.events[-1].observed == 3


@pytest.mark.filterwarnings(r"ignore:step\(\) was called:psap.PsapWarning")
def test_lbfgs_calls_its_closure_many_times() -> None:
    model = Chain()
    opt = torch.optim.LBFGS(model.parameters(), max_iter=3)
    config = psap.Config(protect="pulse", window=2, prune_steps=1)
    pruner = psap.Pruner(model, inputs(), optimizer=opt, config=config)
    pruner.step()
    calls = []
    for _ in range(2):
        opt.step(lambda: (calls.append(1), torch.tensor(backward(model, opt, 0)))[1])
    assert len(calls) > 2
    assert pruner.events[-1].observed == 2
    assert pruner.done


def test_accumulation_clipping_groups_and_scheduler() -> None:
    torch.manual_seed(0)
    model = Chain()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 1e-2},
        {"params": [p for p in model.parameters() if p.dim() == 1], "lr": 0.01},
    ]
    opt = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 6)
    config = psap.Config(protect="pulse", window=2, prune_steps=2)
    pruner = psap.Pruner(model, inputs(), optimizer=opt, config=config)
    for _ in range(4):
        for i in range(3):
            for half in range(2):
                loss = F.cross_entropy(model(inputs(seed=2 * i + half)), labels(seed=i))
                (loss / 2).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            opt.step()
            opt.zero_grad()
        rate.step()
        pruner.step()
    assert [getattr(e, "observed", None) for e in pruner.events] == [None, 2, None, 2]
    result = pruner.finish()
    assert [g["lr"] for g in result.optimizer.param_groups] == rate.get_last_lr()
    assert [g["weight_decay"] for g in result.optimizer.param_groups] == [1e-2, 0]
    train(result.model, result.optimizer, iterations=1)


def test_other_copies_of_the_weights_are_left_alone() -> None:
    model, opt, pruner = make("chain")
    average = torch.optim.swa_utils.AveragedModel(model)
    before = copy.deepcopy(average.state_dict())
    train(model, opt, pruner, epochs=4)
    pruner.finish()
    assert all(torch.equal(t, before[n]) for n, t in average.state_dict().items())


@pytest.mark.usefixtures("dynamo")
def test_a_compiled_model() -> None:
    torch.manual_seed(0)
    model = Chain()
    compiled = torch.compile(model, backend="eager")
    opt = OPTIMIZERS["sgd"](compiled.parameters())
    config = psap.Config(target=psap.Target(macs=0.4), prune_steps=3, window=3)
    pruner = psap.Pruner(compiled, inputs(), optimizer=opt, config=config)
    train(compiled, opt, pruner, epochs=4)
    plain, other, wanted = make("chain")
    train(plain, other, wanted, epochs=4)
    assert all(torch.equal(pruner.masks()[n], m) for n, m in wanted.masks().items())
    assert isinstance(pruner.finish().model, Chain)


def test_channels_last() -> None:
    torch.manual_seed(0)
    model = Chain().to(memory_format=torch.channels_last)
    opt = OPTIMIZERS["sgd"](model.parameters())
    config = psap.Config(target=psap.Target(macs=0.4), prune_steps=3, protect="pulse", window=2)
    pruner = psap.Pruner(model, inputs(), optimizer=opt, config=config)
    train(model, opt, pruner, epochs=4, iterations=3)
    small = pruner.finish().model
    for weight in (model.conv2.weight, small.conv2.weight):
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert not weight.is_contiguous()


def test_a_partly_frozen_model() -> None:
    torch.manual_seed(0)
    model = NETS["residual"]()
    model.stem.requires_grad_(False)
    model.bn1.eval()
    opt = OPTIMIZERS["sgd"]([p for p in model.parameters() if p.requires_grad])
    config = psap.Config(target=psap.Target(macs=0.6), prune_steps=2)
    before = model.stem.weight.detach().clone()
    grads = {n: p.requires_grad for n, p in model.named_parameters()}
    flags = {n: m.training for n, m in model.named_modules()}
    pruner = psap.Pruner(model, inputs(), optimizer=opt, config=config)
    assert "requires_grad is False" in pruner.graph.left_alone["stem"]
    assert "stem" not in {g.name for g in pruner.graph.groups}
    train(model, opt, pruner, epochs=3, iterations=2)
    result = pruner.finish()
    assert torch.equal(model.stem.weight, before)
    assert torch.equal(result.model.stem.weight, before)
    for net in (model, result.model):
        assert {n: p.requires_grad for n, p in net.named_parameters()} == grads
        assert {n: m.training for n, m in net.named_modules()} == flags
