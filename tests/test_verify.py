"""The proof must fail when the surgery is wrong, and name the first layer that differs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import Net, chain, conv, head, image, randomise
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import CASES
from zoo_nets import block

import psap
from psap import refitting, shrink, verify

Break = Callable[[Any], None]


@torch.no_grad()
def _swap(tensor: Tensor) -> None:
    tensor[:2] = tensor[:2].flip(0).clone()


def _broken(monkeypatch: pytest.MonkeyPatch, break_: Break) -> None:
    honest = shrink.small_copy

    def small_copy(model: nn.Module, plan: psap.Plan) -> nn.Module:
        small = honest(model, plan)
        with torch.no_grad():
            break_(small)
        return small

    monkeypatch.setattr(shrink, "small_copy", small_copy)


def _apply(name: str, mode: Any = "module") -> psap.Result:
    model = randomise(CASES[name].make())
    plan = psap.plan(psap.trace(model, CASES[name].inputs), ratio=0.5)
    return psap.apply(model, plan, mode=mode)


@pytest.mark.parametrize(
    ("name", "break_", "layer"),
    [
        ("residual", lambda m: _swap(m.one.weight), "one"),
        ("residual", lambda m: _swap(m.two.weight), "two"),
        ("residual", lambda m: m.one.bias.zero_(), "one"),
        ("residual", lambda m: _swap(m.bn1.weight), "bn1"),
        ("residual", lambda m: _swap(m.bn.running_mean), "bn"),
        ("residual", lambda m: _swap(m.bn2.running_var), "bn2"),
        ("residual", lambda m: m.last.weight.copy_(m.last.weight.flip(1)), "last"),
        ("residual", lambda m: m.head[2].bias.add_(1), r"head\.2"),
        ("dense block", lambda m: _swap(m.norm.bias), "norm"),
        ("depthwise", lambda m: _swap(m.dw.weight), "dw"),
        ("prelu, a slope per channel", lambda m: m.act.weight.copy_(m.act.weight.flip(0)), "act"),
        ("flatten", lambda m: m.fc.weight.copy_(m.fc.weight.flip(1)), "fc"),
    ],
)
def test_wrong_numbers_are_caught(
    name: str, break_: Break, layer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _apply(name)
    _broken(monkeypatch, break_)
    wanted = (
        rf"differs from the masked one by .*eval mode.*the first layer that differs is {layer}$"
    )
    with pytest.raises(psap.VerificationError, match=wanted):
        _apply(name)


def test_groups_that_are_not_updated_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refitting, "_refit_conv", lambda *_: None)
    with pytest.raises(psap.VerificationError, match=r"fails in eval mode with .*; it stops at dw"):
        _apply("depthwise")


def test_a_missing_input_side_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = psap.Plan.kept

    def kept(plan: psap.Plan) -> dict[str, dict[int, tuple[int, ...]]]:
        table = honest(plan)
        del table["two.weight"][1]
        return table

    monkeypatch.setattr(psap.Plan, "kept", kept)
    with pytest.raises(psap.VerificationError, match=r"fails in eval mode.*it stops at two"):
        _apply("residual")


def test_a_head_of_train_mode_is_proved_too(monkeypatch: pytest.MonkeyPatch) -> None:
    _broken(monkeypatch, lambda m: _swap(m.aux.weight))
    with pytest.raises(
        psap.VerificationError, match=r"train mode.*first layer that differs is aux"
    ):
        _apply("auxiliary head")


def test_a_broken_program_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _apply("padded shortcut", "graph").mode == "graph"
    _broken(monkeypatch, lambda m: _swap(m.wide.weight))
    with pytest.raises(
        psap.VerificationError, match=r"graph mode: .* first layer that differs is wide"
    ):
        _apply("padded shortcut", "graph")


@pytest.mark.parametrize(("size", "ok"), [(1e-13, True), (1e-7, False)])
def test_the_tolerance(size: float, ok: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    _broken(monkeypatch, lambda m: m.head[2].bias.mul_(1 + size))
    if ok:
        assert 0 < _apply("residual").report["verification"]["max_relative_error"] < 1e-12
        return
    with pytest.raises(psap.VerificationError, match=r"by \d\.\d\de-0[789]"):
        _apply("residual")


# What could hide an error


def test_fresh_norms_do_not_hide_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    model = chain(8, 6)
    _broken(monkeypatch, lambda m: _swap(m[1].running_mean))  # all zero in a fresh model
    plan = psap.plan(psap.trace(model, image().float()), ratio=0.5)
    with pytest.raises(psap.VerificationError, match=r"first layer that differs is 1$"):
        psap.apply(model, plan, mode="module")


@pytest.mark.parametrize("kind", ["gamma", "layer scale", "group norm", "gate"])
def test_a_branch_that_starts_at_zero_does_not_hide_errors(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: dict[str, Any] = {
        "gamma": (nn.BatchNorm2d(8), lambda m, y: m.z(y)),
        "group norm": (nn.GroupNorm(8, 8), lambda m, y: m.z(y)),
        "layer scale": (nn.Parameter(torch.ones(8, 1, 1)), lambda m, y: m.z * y),
        "gate": (nn.Parameter(torch.ones(1)), lambda m, y: m.z * y),
    }[kind]
    part, use = parts
    model = block(8, lambda m, x: x + use(m, m.one(x)), one=conv(8, 8), z=part)
    nn.init.zeros_(part if isinstance(part, nn.Parameter) else part.weight)
    _broken(monkeypatch, lambda m: m.one.weight.copy_(m.one.weight.flip(1)))
    plan = psap.plan(psap.trace(model, image().float()), ratio=0.5)
    with pytest.raises(psap.VerificationError, match=r"first layer that differs is one$"):
        psap.apply(model, plan, mode="module")


def test_a_bias_that_keeps_relu_open_does_not_hide_errors() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        x = m.one(x)
        return torch.cat([F.relu(x[:, :4]), x[:, 4:]], 1)

    model = block(8, body, one=conv(8, 8)).double()
    with torch.no_grad():
        model.one.bias.fill_(3.0)  # type: ignore[union-attr,operator]
        model.one.bias[0] = 2.9  # type: ignore[index]
    graph = psap.trace(model, image())
    scores = {g.name: torch.arange(g.size, dtype=torch.float64) for g in graph.groups}
    plan = psap.plan(graph, ratio={"one": 0.5}, score=scores)
    with pytest.raises(psap.VerificationError, match="module mode: the small network differs"):
        psap.apply(model, plan, mode="module")


# Honest refusals


def test_a_dense_network_that_gives_nan_is_not_proved() -> None:
    model = randomise(block(8, lambda m, x: m.one(x).sub(9).sqrt() * 0 + x, one=conv(8, 8)))
    plan = psap.plan(psap.trace(model, image()), ratio=0.5)
    with pytest.raises(psap.VerificationError, match="by nan"):
        psap.apply(model, plan)


@pytest.mark.parametrize("name", ["body.weight", "norm.running_var", "head.bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(name: str, value: float) -> None:
    model = nn.Sequential()
    for key, module in {
        "body": nn.Conv2d(3, 8, 3),
        "norm": nn.BatchNorm2d(8),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flat": nn.Flatten(),
        "head": nn.Linear(8, 5),
    }.items():
        model.add_module(key, module)
    plan = psap.plan(psap.trace(model, torch.zeros(2, 3, 8, 8)), ratio=0.5)
    model.state_dict()[name].view(-1)[0] = value
    with pytest.raises(psap.VerificationError, match=rf"^{name} holds values that are not finite"):
        psap.apply(model, plan)
    assert psap.apply(model, plan, check=False).model.body.out_channels == 4


def test_a_dense_network_that_cannot_do_float64_says_so() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            raise RuntimeError("a kernel for float32 only")
        return m.b(F.relu(m.a(x)))

    net = Net(body, a=conv(3, 8), b=conv(8, 4))
    plan = psap.plan(psap.trace(net, image().float()), ratio=0.5)
    with pytest.raises(psap.VerificationError, match=r"dense network itself failed .*RuntimeError"):
        psap.apply(net, plan)
    assert psap.apply(net, plan, check=False).model.a.out_channels == 4


def test_a_mode_in_which_the_dense_network_fails_is_left_out() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        if m.training:
            raise RuntimeError("not for training")
        return m.head(F.relu(m.a(x)))

    model = randomise(Net(body, a=conv(3, 8), head=head(8)))
    plan = psap.plan(psap.trace(model, image()), ratio=0.5)
    assert psap.apply(model, plan, mode="module").report["verification"]["modes"] == ("eval",)


def test_relative_error() -> None:
    one = torch.ones(3, dtype=torch.float64)
    assert verify._relative_error([one], [one]) == 0
    assert verify._relative_error([], []) == float("inf")
    assert verify._relative_error([one], [one, one]) == float("inf")
    assert verify._relative_error([one], [one[:2]]) == float("inf")
    assert verify._relative_error([one * 0], [one]) == float("inf")
    assert verify._relative_error([one * 4], [one * 3]) == 0.25
    assert verify._relative_error([one.long()], [one.long() * 2]) == float("inf")
    bad = torch.tensor([1.0, float("nan"), 1.0], dtype=torch.float64)
    for pair in (([one], [bad]), ([bad], [bad]), ([one, bad], [one, bad])):
        assert not verify._relative_error(*pair) <= 1e-9


def test_dropout_does_not_disturb_the_proof() -> None:
    layers = [*chain(8, 6)]
    model = randomise(nn.Sequential(*layers[:3], nn.Dropout2d(0.5), *layers[3:6], nn.Dropout(0.5),
                                    layers[6]))  # fmt: skip
    plan = psap.plan(psap.trace(model, image()), ratio=0.5)
    result = psap.apply(model, plan)
    assert result.report["verification"]["modes"] == ("eval", "train")
    assert result.model[3].p == 0.5


def test_inputs_in_a_dict_are_compared():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 8, 3)
            self.b = nn.Conv2d(8, 2, 3)

        def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            return self.b(torch.relu(self.a(batch["image"])))

    model = Net()
    graph = psap.trace(model, ({"image": torch.randn(1, 3, 8, 8)},))
    result = psap.apply(model, psap.plan(graph, ratio=0.5))
    assert result.report["verification"]["modes"] == ("eval", "train")
    assert result.model.a.out_channels == 4


def test_an_update_that_the_small_network_loses_is_refused(monkeypatch):
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 8, 3)
            self.b = nn.Conv2d(8, 2, 3)
            self.register_buffer("n", torch.zeros(()))
            self.step = 1

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.b(torch.relu(self.a(x))) + self.n
            self.n.add_(self.step)
            return y

    model = Counting()
    real = shrink.small_copy

    def forgetful(dense, plan):
        small = real(dense, plan)
        small.step = 0
        return small

    monkeypatch.setattr(shrink, "small_copy", forgetful)
    plan = psap.plan(psap.trace(model, torch.randn(2, 3, 8, 8)), ratio=0.5)
    with pytest.raises(psap.VerificationError, match="module mode"):
        psap.apply(model, plan, mode="module")


class _Timed(nn.Module):
    """Embeds a number in float32 and computes a norm there, as diffusion models do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.embed = conv(3, 8), nn.BatchNorm2d(8), nn.Linear(4, 8)
        self.last = conv(8, 5)
        self.scale = torch.ones(1)  # no buffer, so double() does not reach it

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).float()
        x = (x - x.mean((2, 3), keepdim=True)).type(x.dtype)
        angles = t[:, None].float() * torch.arange(4, dtype=torch.float32) * self.scale
        x = x * self.embed(angles.cos())[:, :, None, None]
        return self.last(F.relu(x) / (x.float().norm(dim=1, keepdim=True).to(x.dtype) + 1))


def test_what_forward_casts_to_float32_is_proved_in_float64() -> None:
    torch.manual_seed(0)
    model = _Timed()
    inputs = (image(2, 3, 8, 8).float(), torch.tensor([1, 5]))
    plan = psap.plan(psap.trace(model, inputs), ratio=0.5)
    assert [group.name for group in plan.groups] == ["stem"]
    result = psap.apply(model, plan)
    assert result.report["verification"]["max_relative_error"] < 1e-12
    masked = psap.mask(model, plan).eval()
    assert torch.allclose(result.model.eval()(*inputs), masked(*inputs), atol=1e-5)


def test_a_wrong_network_that_casts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _Timed()
    inputs = (image(2, 3, 8, 8).float(), torch.tensor([1, 5]))
    plan = psap.plan(psap.trace(model, inputs), ratio=0.5)
    _broken(monkeypatch, lambda small: _swap(small.stem.weight))
    with pytest.raises(psap.VerificationError, match="the small network differs"):
        psap.apply(model, plan, mode="module")


def test_an_assertion_without_a_message_is_told() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        x = m.one(x)
        assert x.shape[1] == m.channels
        return F.relu(x)

    model = randomise(block(8, body, one=conv(8, 8), channels=8))
    plan = psap.plan(psap.trace(model, image()), ratio=0.5)
    with pytest.raises(psap.VerificationError, match="fails in eval mode with AssertionError"):
        psap.apply(model, plan, mode="module")
