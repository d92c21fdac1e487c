"""Channels that norms count, or that must be cut off where they are read, behind gates."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from pruner_nets import OPTIMIZERS, Head, backward, inputs, train
from torch import Tensor, nn
from torch.nn import functional as F

import psap
from psap.gates import Gates


class GroupNorms(nn.Module):
    """A residual net whose only norms are group norms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(2, 8)
        self.conv1 = nn.Conv2d(8, 16, 3, padding=1)
        self.norm1 = nn.GroupNorm(4, 16)
        self.conv2 = nn.Conv2d(16, 8, 3, padding=1)
        self.norm2 = nn.GroupNorm(2, 8)
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        y = F.relu(self.norm1(self.conv1(x)))
        return self.head(F.relu(self.norm2(self.conv2(y)) + x))


class LayerNorms(nn.Module):
    """ConvNeXt: depthwise convolution, layer norm over the channels, layer scale, shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, 2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)
        self.scale = nn.Parameter(torch.full((8,), 0.5))
        self.last = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.down(F.gelu(self.up(y))) * self.scale
        x = x + y.permute(0, 3, 1, 2)
        return self.head(self.last(x.mean((2, 3))))


class Standardised(nn.Conv2d):
    """Filters of zero mean and unit spread, with a gain."""

    def __init__(self, reads: int, makes: int) -> None:
        super().__init__(reads, makes, 3, padding=1)
        self.gain, self.fan = nn.Parameter(torch.ones(makes, 1, 1, 1)), reads * 9

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(
            self.weight.reshape(1, self.out_channels, -1), None, None,
            weight=(self.gain * self.fan**-0.5).view(-1), training=True, eps=1e-6,
        ).reshape_as(self.weight)  # fmt: skip
        return F.conv2d(x, weight, self.bias, padding=1)


class NormFree(nn.Module):
    """Standardised filters and no other norm (NFNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = Standardised(3, 12), Standardised(12, 16)
        self.head = Head(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv2(F.relu(self.conv1(x)))))


class Sigmoids(nn.Module):
    """What does not stay zero: the next convolution must be cut, on both of its sides."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 10, 3, padding=1)
        self.conv2 = nn.Conv2d(10, 12, 3, padding=1)
        self.conv3 = nn.Conv2d(12, 8, 3, padding=1)
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.conv2(torch.sigmoid(self.conv1(x))))
        return self.head(F.relu(self.conv3(x)))


class Attention(nn.Module):
    """Patches with positions, heads whose scale comes from their width, layer norms."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.positions = nn.Parameter(torch.randn(1, 4, 16) * 0.5)
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))
        self.project = nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 5)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (2, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        y = self.norm1(x)
        q, k, v = self.heads(self.query(y)), self.heads(self.key(y)), self.heads(self.value(y))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.project(y)
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(x.mean(1))


COUNTED: dict[str, Callable[[], nn.Module]] = {
    "group norms": GroupNorms,
    "layer norms": LayerNorms,
    "standardised": NormFree,
    "sigmoids": Sigmoids,
    "attention": Attention,
}
Made = tuple[nn.Module, torch.optim.Optimizer, psap.Pruner]


def make(
    name: str, *, dtype: torch.dtype = torch.float32, optimizer: str = "sgd", **o: object
) -> Made:
    torch.manual_seed(0)
    model = COUNTED[name]().to(dtype).train()
    opt = OPTIMIZERS[optimizer](model.parameters())
    options = {"target": psap.Target(macs=0.4), "prune_steps": 3, "window": 3, **o}
    config = psap.Config(**options)  # type: ignore[arg-type]
    return model, opt, psap.Pruner(model, inputs(dtype=dtype), optimizer=opt, config=config)


@pytest.mark.parametrize("name", COUNTED)
@pytest.mark.parametrize("protect", ["gate", "price", "pulse", "none"])
def test_every_net_ends_on_budget_exact_and_zero(name: str, protect: str) -> None:
    model, opt, pruner = make(name, protect=protect, optimizer=list(OPTIMIZERS)[len(name) % 4])
    assert len(pruner.graph.groups) == len(psap.trace(model, inputs()).groups)
    train(model, opt, pruner, epochs=3)
    train(model, opt, iterations=4, first=50)
    assert pruner.done
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for side, role in pruner.graph.roles.items():
        channels = pruner.graph.channels[side]
        dead = (channels >= 0) & ~pruner._alive[channels]
        rows = tensors[side[0]].detach().movedim(side[1], 0)[torch.from_numpy(dead)]
        assert role not in ("out", "cut") or not rows.any(), side
    result = pruner.finish()
    assert result.plan.after.macs <= 0.4 * result.plan.before.macs
    assert result.report["verification"]["max_relative_error"] < 1e-9
    masked, small = copy.deepcopy(model).double(), copy.deepcopy(result.model).double()
    x = inputs(dtype=torch.float64)
    with torch.no_grad():
        wanted, got = masked(x), small(x)
    assert float((got - wanted).abs().max()) <= 1e-9 * float(wanted.abs().max())


@pytest.mark.parametrize("name", COUNTED)
def test_what_is_behind_closed_gates_is_nearly_silent(name: str) -> None:
    """Erasing what a closed gate leaves changes little; erasing the same of an open net a lot."""
    model, opt, pruner = make(name, prune_steps=2)
    train(model, opt, iterations=3)
    dense = copy.deepcopy(model)
    pruner.step()
    alive, x = pruner._alive, inputs()
    with torch.no_grad():
        gated = model(x)
        pruner.gates.erase(alive)
        erased = model(x)
        was = dense(x)
    assert (alive.sum() < alive.size) and float((erased - was).abs().max()) > 0.02
    assert float((gated - erased).abs().max()) < 0.05 * float((erased - was).abs().max())


@pytest.mark.parametrize("name", COUNTED)
def test_opened_gates_give_everything_back_bit_for_bit(name: str) -> None:
    """Also where filters of a pruned channel cross the columns of another: both were scaled."""
    model, opt, pruner = make(name)
    train(model, opt, iterations=2)
    gates, count = pruner.gates, len(pruner.graph.group_of)
    before = copy.deepcopy(model.state_dict())
    one = np.arange(count) % 3 != 0  # pruned first
    both = one & (np.arange(count) % 3 != 1)  # then others, whose columns the first cross
    gates.close(one)
    gates.close(both)
    assert any(not torch.equal(before[k], v) for k, v in model.state_dict().items())
    for key, value in gates.weights().items():
        if key in {call.weight for call in pruner.graph.calls}:
            assert torch.equal(value, before[key]), key  # scores see them open
    gates.open(~one)  # the first come back, while the others stay closed
    gates.close(~(one & ~both))
    gates.open(one & ~both)
    assert not any(saved.rows.numel() for saved in gates.saved.values())
    for key, value in model.state_dict().items():
        assert torch.equal(before[key], value), key


@pytest.mark.parametrize("name", COUNTED)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_training_on_is_the_same_masked_and_shrunk(name: str, optimizer: str) -> None:
    kind = torch.float64
    model, opt, pruner = make(name, optimizer=optimizer, dtype=kind)
    train(model, opt, pruner, epochs=3, iterations=2, dtype=kind)
    twin, twin_opt, held = copy.deepcopy((model, opt, pruner._alive))
    result = pruner.finish()
    assert result.optimizer is not None
    small = train(result.model, result.optimizer, iterations=6, first=9, dtype=kind)
    opt2 = OPTIMIZERS[optimizer](twin.parameters())
    opt2.load_state_dict(twin_opt.state_dict())
    gates, masked = Gates(psap.trace(twin, inputs(dtype=kind)), opt2, 0.0), []
    for i in range(6):
        masked.append(backward(twin, opt2, 109 + i, kind))
        opt2.step()
        gates.erase(held)
    assert small == pytest.approx(masked, rel=1e-6)
    assert small[0] != pytest.approx(small[-1], rel=1e-3)


@pytest.mark.parametrize("name", COUNTED)
@pytest.mark.parametrize("protect", ["gate", "pulse"])
def test_a_run_resumes_bit_for_bit(name: str, protect: str) -> None:
    model, opt, pruner = make(name, protect=protect)
    train(model, opt, pruner)
    train(model, opt, iterations=1, first=30)  # in the middle of a window
    states = copy.deepcopy((model.state_dict(), opt.state_dict(), pruner.state_dict()))
    outcomes = []
    for again in (False, True):
        if again:
            model, opt, pruner = make(name, protect=protect)
            model.load_state_dict(states[0])
            opt.load_state_dict(states[1])
            pruner.load_state_dict(states[2])
        train(model, opt, pruner, epochs=2, first=40)
        train(model, opt, iterations=4, first=60)
        outcomes.append((copy.deepcopy(model.state_dict()), pruner.masks()))
    for one, two in zip(*outcomes, strict=True):
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_progressive_cuts_take_what_modules_can_lose_as_they_are() -> None:
    model, opt, pruner = make("layer norms", progressive=True, target=psap.Target(macs=0.6))
    assert [group.name for group in pruner.graph.groups] == ["up"]
    with pytest.raises(psap.TargetError, match="norm over several channels: its statistics"):
        make("group norms", progressive=True)
    train(model, opt, pruner, epochs=3)
    assert type(pruner.finish().model) is LayerNorms


class Branching(nn.LayerNorm):
    """A norm whose forward() torch.fx cannot trace, so that no program can count zeros for it."""

    def forward(self, x: Tensor) -> Tensor:
        if float(x.detach().sum()) > 1e9:
            return x
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


def test_less_is_pruned_with_a_warning_where_no_program_can_be_made() -> None:
    torch.manual_seed(0)
    model = LayerNorms().train()
    model.norm = Branching(8)
    before = copy.deepcopy(model.state_dict())
    opt = OPTIMIZERS["sgd"](model.parameters())
    config = psap.Config(target=psap.Target(macs=0.6), prune_steps=3)
    with pytest.warns(psap.PsapWarning, match="1 channel groups are pruned, and not those that n"):
        pruner = psap.Pruner(model, inputs(), optimizer=opt, config=config)
    assert [group.name for group in pruner.graph.groups] == ["up"]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    train(model, opt, pruner, epochs=3)
    assert type(pruner.finish().model) is LayerNorms
