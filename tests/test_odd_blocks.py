"""Residual branches in odd modules: what must stay, what must be refused, and in which words."""

from __future__ import annotations

from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import assert_same, conv, image, randomise, snapshot
from test_blocks import _Block
from torch import Tensor, nn
from torch.nn import functional as F

import psap
from psap.branches import branches
from psap.cli import main
from psap.models import resnet20


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


@pytest.mark.parametrize("blocks", [["1.a"], ["1.b"], ["1.c"], ["1.a", "1.c"], ["1.*"]])
def test_parallel_branches_go_one_by_one(blocks: list[str]) -> None:
    class Parallel(_Two):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.c = nn.BatchNorm2d(8), conv(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return x + self.a(y) + self.b(y) + self.c(y)

    result = psap.drop_blocks(_around(Parallel()), image(), blocks=blocks)
    gone = {"1.a", "1.b", "1.c"} if blocks == ["1.*"] else set(blocks)
    assert {block.name for block in result.plan.dropped} == gone
    left = {name.rsplit(".", 1)[0] for name, _ in result.model.named_parameters()}
    assert left == {"0", "1.norm", "1.a", "1.b", "1.c", "2"} - gone - (
        {"1.norm"} if len(gone) == 3 else set()
    )


def test_a_sum_with_a_shortcut_that_has_weights_is_none() -> None:
    class Down(_Two):
        def __init__(self) -> None:
            super().__init__()
            self.shortcut = conv(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.shortcut(x) + self.a(x) + self.b(x)

    with pytest.raises(psap.ArgumentError, match=r"'1\.b', which is no residual branch"):
        psap.drop_blocks(_around(Down(), _Two()), image(), blocks=["1.b"])


class _Streams(_Two):
    """A sum of two values, each of which may be a sum itself."""

    def __init__(self, total: Any) -> None:
        super().__init__()
        self.other, self.place = conv(8, 8), nn.Parameter(torch.ones(1, 8, 1, 1))
        self.total = total

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.total(self, x)
        return found


def _one_each(m: Any, x: Tensor) -> Tensor:
    return (x + m.a(x)) + (x + m.b(x))


def _fused(m: Any, x: Tensor) -> Tensor:
    second = m.other(x).relu()
    return m.a(x) + (second + m.b(second))


def _placed(m: Any, x: Tensor) -> Tensor:
    return m.a(x) + (m.place + m.b(x))


@pytest.mark.parametrize(
    ("total", "wanted"), [(_one_each, {"1.a", "1.b"}), (_fused, {"1.b"}), (_placed, set())]
)
def test_sums_of_sums(total: Any, wanted: set[str]) -> None:
    model = _around(_Streams(total))
    found = {branch.block.name for branch in branches(model, (image(),))}
    assert found == wanted
    if found:
        psap.drop_blocks(model, image(), blocks=sorted(found))
