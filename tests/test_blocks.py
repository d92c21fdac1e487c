"""Depth pruning: residual branches that go whole, the proof of it, and what goes along."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Net, assert_same, conv, image, randomise, snapshot
from torch import Tensor, nn
from torch.nn import functional as F

import psap
from psap.branches import branches
from psap.models import resnet20


def _small(seed: int = 0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    return randomise(resnet20(num_classes=4)), image(2, 3, 16, 16)


def _names(model: nn.Module, x: Any) -> list[str]:
    return [branch.block.name for branch in branches(model, x if isinstance(x, tuple) else (x,))]


def _zeroed(model: nn.Module, prefix: str) -> nn.Module:
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in masked.get_submodule(prefix).parameters():
            parameter.zero_()
    return masked


class _Block(nn.Module):
    """A convolution and its norm, added to what came in."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv, self.bn = conv(channels, channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn(self.conv(x)))


class _Pair(nn.Module):
    """Two branches, one after the other, as in a transformer block; each has a scale of its own."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm1, self.first = nn.LayerNorm(width), nn.Linear(width, width)
        self.norm2, self.second = nn.LayerNorm(width), nn.Linear(width, 2 * width)
        self.last = nn.Linear(2 * width, width)
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.dropout(self.scale * self.first(self.norm1(x)), 0.1, self.training)
        return x.add(self.last(F.gelu(self.second(self.norm2(x)))))


def test_resnet20_has_a_branch_in_every_block() -> None:
    model, x = _small()
    before = snapshot(model)
    names = _names(model, x)
    assert [name.rpartition(".")[0] for name in names] == [
        f"layer{stage}.{at}" for stage in (1, 2, 3) for at in range(3)
    ]
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("training", [False, True])
def test_the_network_equals_the_whole_one_with_zeros(training: bool) -> None:
    model, x = _small()
    result = psap.drop_blocks(model, x, blocks=["layer1.1", "layer3.*"])
    assert [b.name for b in result.plan.dropped] == [
        "layer1.1.conv1", "layer3.0.conv2", "layer3.1.conv1", "layer3.2.conv1"
    ]  # fmt: skip
    masked = model
    for name in ("layer1.1", "layer3.0", "layer3.1", "layer3.2"):
        masked = _zeroed(masked, name)
    small = result.model
    assert torch.equal(small.train(training)(x), masked.train(training)(x))
    assert not any(name.startswith(("layer1.1.", "layer3.")) for name in small.state_dict())
    assert torch.equal(psap.mask(model, result.plan).train(training)(x), small(x))
    assert result.report["verification"]["max_relative_error"] < 1e-9
    assert result.report["verification"]["silent"] == ()
    graph = psap.trace(small, x)
    assert psap.plan(graph, ratio=0.0).before == result.plan.after
    assert result.plan.before.macs > result.plan.after.macs
    assert "without the residual branch of layer1.1.conv1" in result.plan.explain()


def test_two_branches_of_one_module() -> None:
    model = randomise(nn.Sequential(nn.Linear(8, 8), _Pair(), _Pair(), nn.Linear(8, 3)))
    x = torch.rand(2, 5, 8, dtype=torch.float64)
    assert _names(model, x) == ["1.first", "1.second", "2.first", "2.second"]
    small = psap.drop_blocks(model, x, blocks=["1.first", "2.second", "2.first"]).model.eval()
    kept = [name for name in small.state_dict() if name[0] in "12"]
    assert all(name.startswith(("1.norm2", "1.second", "1.last")) for name in kept) and kept
    x.requires_grad_()
    small.train()(x).sum().backward()
    assert x.grad is not None


def _counted(model: nn.Module, wanted: dict[str, float], base: float) -> Any:
    """A loss that says what each silenced branch costs."""

    def loss(net: nn.Module) -> float:
        loss.calls += 1  # type: ignore[attr-defined]
        assert not net.training and net is not model
        gone = [n for n in wanted if not net.get_submodule(n).conv2.weight.any()]
        return base + sum(wanted[n] for n in gone)

    loss.calls = 0  # type: ignore[attr-defined]
    return loss


def test_the_cheapest_branches_go_until_the_loss_is_too_high() -> None:
    model, x = _small()
    before = snapshot(model)
    costs = {f"layer{s}.{b}": 1.0 for s in (1, 2, 3) for b in range(3)}
    costs |= {"layer2.1": 0.2, "layer1.2": 0.1, "layer3.2": 0.15}
    loss = _counted(model, costs, 1.0)
    result = psap.drop_blocks(model, x, evaluate=loss, tolerance=0.5)
    assert {b.name for b in result.plan.dropped} == {
        "layer1.2.conv1", "layer3.2.conv1", "layer2.1.conv1"
    }  # fmt: skip
    report = result.report["blocks"]
    assert [entry["block"] for entry in report] == [
        None, "layer1.2.conv1", "layer3.2.conv1", "layer2.1.conv1"
    ]  # fmt: skip
    assert [entry["loss"] for entry in report] == pytest.approx([1.0, 1.1, 1.25, 1.45])
    share = result.plan.after.macs / result.plan.before.macs
    assert report[-1]["macs_share"] == pytest.approx(share)
    assert loss.calls <= 1 + 9 + 3 * 7
    assert_same(before, snapshot(model))
    two = psap.drop_blocks(model, x, evaluate=loss, tolerance=0.5, most=1)
    assert [b.name for b in two.plan.dropped] == ["layer1.2.conv1"]


def test_a_network_whose_branches_all_matter_stays_whole() -> None:
    model, x = _small()
    costs = {f"layer{s}.{b}": 1.0 + b for s in (1, 2, 3) for b in range(3)}
    result = psap.drop_blocks(model, x, evaluate=_counted(model, costs, 1.0))
    assert result.plan.dropped == () and result.plan.after == result.plan.before
    assert torch.equal(result.model.eval()(x), model.eval()(x))


def test_optimizer_schedulers_and_averages_go_along() -> None:
    model, x = _small()
    plain = {"params": [p for n, p in model.named_parameters() if not n.startswith("layer1.1")]}
    inner = {"params": list(model.layer1[1].parameters()), "lr": 0.5}
    optimizer = torch.optim.AdamW([plain, inner], lr=0.01)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    average = torch.optim.swa_utils.AveragedModel(model)
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(x).square().mean().backward()
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
    result = psap.drop_blocks(
        model, x, blocks=["layer1.1"], optimizer=optimizer, friends=[schedule, average]
    )
    small, fresh = result.model, result.optimizer
    assert fresh is not None and len(fresh.param_groups[1]["params"]) == 0
    names = {id(p): n for n, p in model.named_parameters()}
    left = {id(p): n for n, p in small.named_parameters()}
    moments = {names[id(p)]: state["exp_avg"] for p, state in optimizer.state.items()}
    assert {left[id(p)] for p in fresh.state} == set(left.values())
    for parameter, state in fresh.state.items():
        assert torch.equal(state["exp_avg"], moments[left[id(parameter)]])
    new_schedule, new_average = result.friends
    assert new_schedule.optimizer is fresh
    assert torch.isfinite(new_average.eval()(x)).all()
    small.train()(x).square().mean().backward()
    fresh.step()
    new_average.update_parameters(small)


def _pruned(model: nn.Module, x: Tensor) -> tuple[psap.Result, psap.Result]:
    first = psap.drop_blocks(model, x, blocks=["layer1.1", "layer2.2"])
    optimizer = torch.optim.SGD(first.model.parameters(), lr=0.01)
    target = psap.Target(macs=0.5)
    pruner = psap.Pruner(
        first.model,
        x,
        optimizer=optimizer,
        config=psap.Config(target=target.after(first), prune_steps=1, window=2),
    )
    for _ in range(4):
        optimizer.zero_grad()
        first.model.train()(x).square().mean().backward()
        optimizer.step()
        pruner.step()
    return first, pruner.finish()


def test_then_channels_go_and_files_hold_both(tmp_path: Path) -> None:
    model, x = _small()
    first, last = _pruned(model, x)
    dense = first.plan.before.macs
    assert 0.4 * dense < last.plan.after.macs <= 0.5 * dense
    assert last.plan.without == (("layer1.1.conv1", "layer2.2.conv1"),)
    for at, result in enumerate((first, last)):
        file = tmp_path / f"{at}.safetensors"
        psap.save(result, file)
        again = psap.load(file, lambda: resnet20(num_classes=4).double())
        assert torch.equal(again.eval()(x), result.model.eval()(x))
        assert list(again.state_dict()) == list(result.model.state_dict())
    plan = psap.Plan.from_json(last.plan.to_json())
    assert plan == last.plan and plan.without == last.plan.without
    assert psap.Plan.from_json(first.plan.to_json()) == first.plan
    assert "dropped before: the residual branch of layer2.2.conv1" in last.plan.explain()


def test_branches_may_go_in_two_rounds(tmp_path: Path) -> None:
    model, x = _small()
    one = psap.drop_blocks(model, x, blocks=["layer1.1"])
    two = psap.drop_blocks(one.model, x, blocks=["layer3.1"])
    graph = psap.trace(two.model, x)
    small = psap.apply(two.model, psap.plan(graph, ratio=0.5))
    assert small.plan.without == (("layer1.1.conv1",), ("layer3.1.conv1",))
    for result in (two, small):
        psap.save(result, tmp_path / "small.safetensors")
        again = psap.load(tmp_path / "small.safetensors", lambda: resnet20(num_classes=4).double())
        assert torch.equal(again.eval()(x), result.model.eval()(x))
    with pytest.raises(psap.ArgumentError, match="made for another model"):
        psap.apply(model, two.plan)


def test_exports(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = resnet20(num_classes=4).eval()
    x = torch.rand(2, 3, 16, 16)
    result = psap.drop_blocks(model, x, blocks=["layer1.1", "layer3.2"])
    psap.export_onnx(result, tmp_path / "small.onnx", x)
    psap.export_pt2(result, tmp_path / "small.pt2", x)
    loaded = torch.export.load(tmp_path / "small.pt2").module()
    assert torch.allclose(loaded(x), result.model.eval()(x), atol=1e-6)


def test_targets_of_what_is_left() -> None:
    model, x = _small()
    result = psap.drop_blocks(model, x, blocks=["layer1.*"])
    before, after = result.plan.before, result.plan.after
    left = psap.Target(macs=0.3, parameters=0.5).after(result)
    assert left.macs == pytest.approx(0.3 * before.macs / after.macs)
    assert left.parameters == pytest.approx(0.5 * before.parameters / after.parameters)
    assert psap.Target(macs=0.9).after(result).macs == 1.0
    with pytest.raises(psap.ArgumentError, match="does not say its latency"):
        psap.Target(latency=0.5).after(result)


def test_what_is_no_branch() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x) + m.table  # a parameter that is added
        x = m.left(x) + m.right(x)  # both sides have weights
        x = x + x.mean()  # no weights
        x = torch.add(x, m.scaled(x), alpha=2)  # not a plain sum
        return m.last(m.keep(x) + x * m.gate(x))

    model = randomise(
        Net(
            body,
            table=nn.Parameter(torch.ones(8, 1, 1)),
            stem=conv(3, 8), left=conv(8, 8), right=conv(8, 8), scaled=conv(8, 8),
            keep=nn.Identity(), gate=conv(8, 8), last=conv(8, 3),
        )
    )  # fmt: skip
    assert _names(model, image()) == ["gate"]


def test_a_branch_that_acts_on_its_shortcut_in_place_is_refused() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x.relu_()) + x

    model = randomise(nn.Sequential(conv(3, 8), InPlace(), conv(8, 2)))
    before = snapshot(model)
    with pytest.raises(psap.VerificationError, match="differs from the masked one"):
        psap.drop_blocks(model, image(), blocks=["1"])
    assert_same(before, snapshot(model))


def test_a_shared_layer_stays_where_it_is_used() -> None:
    model = nn.Sequential(conv(3, 8), _Block(), _Block(), conv(8, 2))
    model[2].conv = model[1].conv
    randomise(model)
    x = image()
    small = psap.drop_blocks(model, x, blocks=["2"]).model
    assert "1.conv.weight" in small.state_dict() and "2.conv.weight" not in small.state_dict()


def test_stochastic_depth_draws_for_fewer_branches() -> None:
    class Dropping(_Block):
        def forward(self, x: Tensor) -> Tensor:
            y = self.bn(self.conv(x))
            if self.training:
                y = y * x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(0.8).div_(0.8)
            return x + y

    model = randomise(nn.Sequential(conv(3, 8), Dropping(), Dropping(), conv(8, 2)))
    # its two modes differ, so torch.fx refuses it unless a module draws
    assert _names(model, image()) == []

    class Path_(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                return x
            return x * x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(0.8).div_(0.8)

    class Block(_Block):
        def __init__(self) -> None:
            super().__init__()
            self.path = Path_()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.path(self.bn(self.conv(x)))

    model = randomise(nn.Sequential(conv(3, 8), Block(), Block(), Block(), conv(8, 2)))
    result = psap.drop_blocks(model, image(4, 3, 8, 8), blocks=["1"])
    assert result.report["verification"]["modes"] == ("eval", "train")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({}, psap.ArgumentError, "give either"),
        ({"blocks": ["layer1"], "evaluate": lambda m: 1.0}, psap.ArgumentError, "give either"),
        ({"blocks": "layer1"}, psap.ArgumentTypeError, "pass a list of names"),
        ({"blocks": [3]}, psap.ArgumentTypeError, "pass a list of names"),
        ({"blocks": ["layer9"]}, psap.ArgumentError, "no residual branch: layer1.0"),
        ({"evaluate": 3}, psap.ArgumentTypeError, "must be a function"),
        ({"evaluate": lambda m: None}, psap.ArgumentTypeError, "returned a NoneType"),
        ({"evaluate": lambda m: float("nan")}, psap.ArgumentError, "positive, finite loss"),
        ({"evaluate": lambda m: 0.0}, psap.ArgumentError, "positive, finite loss"),
        ({"evaluate": lambda m: 1.0, "tolerance": -1}, psap.ArgumentError, "tolerance is -1"),
        ({"evaluate": lambda m: 1.0, "tolerance": "x"}, psap.ArgumentTypeError, "tolerance is"),
        ({"evaluate": lambda m: 1.0, "most": 1.5}, psap.ArgumentTypeError, "most is 1.5"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], words: str) -> None:
    model, x = _small()
    before = snapshot(model)
    with pytest.raises(error, match=words):
        psap.drop_blocks(model, x, **options)
    assert_same(before, snapshot(model))


def test_a_loss_that_fails_or_is_interrupted_leaves_the_model() -> None:
    model, x = _small()
    before = snapshot(model)

    def loss(net: nn.Module) -> float:
        raise KeyboardInterrupt("now")

    with pytest.raises(KeyboardInterrupt, match="now"):
        psap.drop_blocks(model, x, evaluate=loss)
    assert_same(before, snapshot(model))


def test_plans_that_drop_are_carried_out_in_a_copy() -> None:
    model, x = _small()
    plan = psap.drop_blocks(model, x, blocks=["layer1.1"]).plan
    assert psap.apply(model, plan, example_inputs=x).plan.dropped == plan.dropped
    with pytest.raises(psap.ArgumentError, match="in a copy"):
        psap.apply(model, plan, inplace=True)
    with pytest.raises(psap.ArgumentError, match="in a copy"):
        psap.apply(model, plan, mode="module")


def test_a_damaged_plan_is_refused() -> None:
    model, x = _small()
    text = psap.drop_blocks(model, x, blocks=["layer1.1"]).plan.to_json()
    name = '"layer1.1.conv1.weight"'
    for wrong in ("3", "null", "[]"):
        with pytest.raises(psap.FileError, match="damaged"):
            psap.Plan.from_json(text.replace(f"[{name}", f"[{wrong}", 1))
    foreign = psap.Plan.from_json(text.replace(f"[{name}", '["no.such"', 1))
    with pytest.raises(psap.ArgumentError, match=r"has no 'no\.such'"):
        psap.apply(model, foreign, example_inputs=x)
