"""Depth pruning: residual branches that go whole, the proof of it, and what goes along."""

from __future__ import annotations

import copy
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Net, assert_same, conv, image, randomise, snapshot
from torch import Tensor, nn
from torch.nn import functional as F

import psap
from psap.branches import branches
from psap.cli import main
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


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(8, 8), conv(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(x)
        return x + self.b(x)


def _around(*blocks: nn.Module) -> nn.Module:
    return randomise(nn.Sequential(conv(3, 8), *blocks, conv(8, 4)))


def test_checks_of_sizes_stay() -> None:
    class Padded(_Two):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[-1] % 4 > 0:
                x = F.pad(x, (0, 4 - x.shape[-1] % 4))
            return super().forward(x)

    small = psap.drop_blocks(_around(Padded()), image(), blocks=["1.a"]).model
    with pytest.raises(psap.ArgumentError, match="does something else for inputs of this size"):
        small(image(2, 3, 6, 6))


def test_updates_beside_a_branch_stay() -> None:
    class Counting(_Two):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            self.mean.mul_(0.9).add_(x.detach().mean((0, 2, 3)), alpha=0.1)
            return super().forward(x)

    model = _around(Counting(), Counting())
    result = psap.drop_blocks(model, image(), blocks=["1.a"])
    assert result.plan.dropped[0].tensors == ("1.a.weight", "1.a.bias")
    before = result.model[1].mean.clone()
    result.model.train()(image())
    assert not torch.equal(result.model[1].mean, before)


@pytest.mark.parametrize("first", [True, False])
def test_an_activation_in_place_after_the_sum_leaves_the_shortcut(first: bool) -> None:
    class InPlace(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.conv, self.relu = conv(channels, channels), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            out = self.conv(x)
            out += x
            return self.relu(out)  # type: ignore[no-any-return]

    blocks = [InPlace(3), conv(3, 4)] if first else [conv(3, 8), InPlace(8), InPlace(8)]
    model, x = randomise(nn.Sequential(*blocks)), image()
    given = x.clone()
    small = psap.drop_blocks(model, x, blocks=["0" if first else "2"]).model
    small.train()(x).sum().backward()
    assert torch.equal(x, given)


def test_a_branch_that_cannot_go_is_left_with_a_warning() -> None:
    class Open(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = conv(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.sigmoid(self.a(x))  # zeros give one half

    model = _around(Open(), _Block())

    def loss(net: nn.Module) -> float:
        return 1 + float(net(image()).square().mean()) * 1e-6

    with pytest.warns(psap.PsapWarning, match=r"1\.a cannot go"):
        result = psap.drop_blocks(model, image(), evaluate=loss, tolerance=9.0)
    assert [block.name for block in result.plan.dropped] == ["2.conv"]
    assert [entry["block"] for entry in result.report["blocks"]] == [None, "2.conv"]
    with pytest.warns(psap.PsapWarning, match="has no residual branch"):
        psap.drop_blocks(nn.Sequential(conv(3, 4)).double(), image(), evaluate=loss)


def test_a_branch_that_is_part_of_another_is_counted_once() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.inner, self.after = conv(8, 16), nn.Sequential(_Wide()), conv(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.after(self.inner(self.before(x)))

    class _Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = conv(16, 16, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.a(x)

    def loss(net: nn.Module) -> float:
        return 1 + 1e-9 * float(net(image()).square().mean())

    result = psap.drop_blocks(_around(Nested(), Nested()), image(), evaluate=loss)
    share = result.plan.after.macs / result.plan.before.macs
    assert result.report["blocks"][-1]["macs_share"] == pytest.approx(share)


def test_a_layer_whose_weight_is_read_too_goes() -> None:
    class Reading(_Two):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.b(F.relu(self.a(x.to(self.a.weight.dtype))))

    small = psap.drop_blocks(_around(Reading(), _Block()), image(), blocks=["1.*"]).model
    assert not any(name.startswith("1.") for name in small.state_dict())


def test_train_that_names_a_layer_that_goes() -> None:
    class Frozen(_Two):
        def train(self, mode: bool = True) -> Frozen:
            super().train(mode)
            self.a.eval()
            return self

    with pytest.raises(psap.VerificationError, match=r"train\(\) of the model fails"):
        psap.drop_blocks(_around(Frozen()), image(), blocks=["1.a"])


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda net: 1.0, "let it run the model that it is given"),
        (lambda net: next(net.parameters()).detach().add_(1).sum() ** 2 + 1, "only measure"),
    ],
)
def test_losses_that_are_none(loss: Any, words: str) -> None:
    model = _around(_Block(), _Block())
    before = snapshot(model)
    with pytest.raises(psap.ArgumentError, match=words):
        psap.drop_blocks(model, image(), evaluate=loss)
    assert_same(before, snapshot(model))


def test_plans_that_drop_other_branches_are_not_compared() -> None:
    model = _around(_Two(), _Two())
    one, two = (psap.drop_blocks(model, image(), blocks=[n]).plan for n in ("1.a", "2.b"))
    with pytest.raises(psap.ArgumentError, match=r"different residual branches \(1\.a, 2\.b\)"):
        one.diff(two)


def test_the_command_line_exports_what_was_dropped_and_pruned(tmp_path: Path) -> None:
    model, x = resnet20(num_classes=10), torch.rand(2, 3, 32, 32)
    first = psap.drop_blocks(model, x, blocks=["layer1.1"])
    small = psap.apply(first.model, psap.plan(psap.trace(first.model, x), ratio=0.3))
    file = tmp_path / "small.safetensors"
    psap.save(small, file)
    for more in ([], ["--arch", "resnet20"]):
        out = tmp_path / f"{len(more)}.pt2"
        assert main(["export", str(file), "--format", "pt2", "--out", str(out), *more]) == 0
        assert out.exists()


def test_a_model_that_fails_on_zeros_is_rebuilt_nowhere(tmp_path: Path) -> None:
    class Lengths(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.body = conv(3, 8), _Two()

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            if int(lengths.max()) < 1:
                raise ValueError("empty batch")
            return self.body(self.stem(x)) * lengths[:, None, None, None]

    inputs = (image(), torch.tensor([1, 2, 3, 4]))
    result = psap.drop_blocks(Lengths().double(), inputs, blocks=["body.a"])
    psap.save(result, tmp_path / "small.safetensors")
    with pytest.raises(psap.FileError, match="on zeros of the shapes"):
        psap.load(tmp_path / "small.safetensors", lambda: Lengths().double())


def test_pickles_keep_what_forward_does_not_use() -> None:
    model = _around(_Spare())
    small = psap.drop_blocks(model, image(), blocks=["1.a"]).model
    again = ForkingPickler.loads(ForkingPickler.dumps(small))
    assert set(again.state_dict()) == set(small.state_dict()) and "1.spare" in again.state_dict()


class _Spare(_Two):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Parameter(torch.ones(2))
