"""A proof must not hold by accident: where a network is dead, two different ones look the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nets import Net, assert_exact, conv, head, image, randomise
from torch import Tensor, nn
from torch.nn import functional as F
from zoo_nets import block

import psap
from psap import settling, shrink, sloping
from psap.graph.elementwise import keeps_zero
from psap.graph.rules import RULES


def _kept(graph: psap.graph.Graph, layer: str, kept: list[int]) -> psap.Plan:
    """The plan that keeps these channels of one layer, and all others."""
    scores = {g.name: torch.ones(g.size, dtype=torch.float64) for g in graph.groups}
    size = scores[layer].numel()
    scores[layer][kept] = 2.0
    return psap.plan(graph, ratio={layer: 1 - len(kept) / size}, score=scores)


def _half_rectified(at: int, bias: float) -> nn.Module:
    """A ReLU in place on the first channels, behind one that is closed for inputs around zero."""

    def body(m: Any, x: Tensor) -> Tensor:
        x = m.one(F.relu(m.stem(x)))
        x[:, :at].relu_()
        return m.head(x)

    model = Net(body, stem=conv(3, 4), one=conv(4, 8), head=head(8)).double()
    with torch.no_grad():
        model.stem.weight.abs_()  # type: ignore[union-attr,operator]
        model.stem.bias.copy_(bias - torch.arange(4.0))  # type: ignore[union-attr,operator]
        model.one.weight.abs_().neg_()  # type: ignore[union-attr,operator]
        model.one.bias.copy_(torch.rand(8) + 0.5)  # type: ignore[union-attr,operator]
    return model


@pytest.mark.parametrize("bias", [0.0, -100.0])
@pytest.mark.parametrize("kept", [[4, 5, 6, 7], [2, 5, 6], [6]])
def test_a_slice_of_fixed_size_is_noticed_behind_a_closed_relu(
    kept: list[int], bias: float
) -> None:
    model = _half_rectified(4, bias)
    pictures = (image() * 40 + 128,)  # open the ReLU, as no random numbers around zero do
    plan = _kept(psap.trace(model, pictures), "one", kept)
    with pytest.raises(psap.VerificationError, match="module mode: the small network differs"):
        psap.apply(model, plan, mode="module")
    result = psap.apply(model, plan)
    assert result.mode == "graph"
    assert_exact(model, plan, result.model, pictures)


@pytest.mark.parametrize("training_only", [False, True])
def test_so_it_is_in_one_mode_alone(training_only: bool) -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        x = m.one(F.relu(m.stem(x) - 100))
        if m.training is training_only:
            x[:, :4].relu_()
        return m.head(x)

    model = randomise(Net(body, stem=conv(3, 4), one=conv(4, 8), head=head(8)))
    plan = _kept(psap.trace(model, image()), "one", [5, 6])
    mode = "train" if training_only else "eval"
    with pytest.raises(psap.VerificationError, match=f"module mode: .* by .*{mode} mode"):
        psap.apply(model, plan, mode="module")


def test_a_network_that_is_dead_is_not_proved() -> None:
    model = randomise(block(8, lambda m, x: m.one(x) * 0.0, one=conv(8, 8)))
    plan = psap.plan(psap.trace(model, image()), ratio=0.5)
    assert plan.sides
    with pytest.raises(psap.VerificationError, match="gives the same for all random inputs"):
        psap.apply(model, plan)
    assert psap.apply(model, plan, check=False).model.one.out_channels == 4


def test_numbers_that_are_no_floats_may_be_the_same_for_all_inputs() -> None:
    model = randomise(Net(lambda m, x: m.head(F.relu(m.one(x))).argmax(1) * 0, one=conv(3, 8),
                          head=head(8)))  # fmt: skip
    plan = psap.plan(psap.trace(model, image()), ratio=0.5)
    assert psap.apply(model, plan).mode == "module"


def test_layers_that_give_the_same_for_all_inputs_are_named() -> None:
    model = randomise(
        block(8, lambda m, x: x + m.dead(m.alive(x) * 0.0), alive=conv(8, 8), dead=conv(8, 8))
    )
    plan = psap.plan(psap.trace(model, image()), ratio=0.5)
    assert psap.apply(model, plan).report["verification"]["silent"] == ("dead",)


def test_a_layer_that_later_ones_level_is_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The outputs are the same, but only because nothing of this layer is left in them."""
    honest = shrink.small_copy

    def small_copy(model: nn.Module, plan: psap.Plan) -> nn.Module:
        small = honest(model, plan)
        with torch.no_grad():
            small.one.weight.copy_(small.one.weight.flip(0))
        return small

    model = randomise(block(8, lambda m, x: x + m.one(x) * 1e-12, one=conv(8, 8)))
    plan = psap.plan(psap.trace(model, image()), ratio=0.5)
    assert psap.apply(model, plan).mode == "module"
    monkeypatch.setattr(shrink, "small_copy", small_copy)
    with pytest.raises(psap.VerificationError, match=r"by chance.*layer that differs is one"):
        psap.apply(model, plan)


def test_a_module_that_runs_once_for_every_channel_is_no_difference() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        x = m.one(x)
        return torch.cat([m.act(x[:, at : at + 1]) for at in range(x.shape[1])], 1)

    model = randomise(block(8, body, one=conv(8, 8), act=nn.ReLU()))
    plan = _kept(psap.trace(model, image()), "one", [2, 3, 5])
    result = psap.apply(model, plan, mode="module")
    assert_exact(model, plan, result.model, (image(),))


def _deep(scale: float, width: int = 8) -> nn.Module:
    """Convolutions with small weights under norms whose statistics are not of the data."""
    layers: list[nn.Module] = []
    for at in range(12):
        layers += [conv(width if at else 3, width, bias=False), nn.BatchNorm2d(width)]
        layers += [nn.ReLU()]
    model = randomise(nn.Sequential(*layers, head(width)))
    with torch.no_grad():
        for module in model:
            if isinstance(module, nn.Conv2d):
                module.weight.mul_(scale)
    return model


@pytest.mark.parametrize("scale", [0.03, 1.0, 1e3])
def test_norms_do_not_level_the_inputs_out(scale: float) -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        if m.training:
            raise RuntimeError("it cannot train, where norms would take statistics of the batch")
        return m.deep(x)

    model = Net(body, deep=_deep(scale)).eval()
    plan = psap.plan(psap.trace(model, image()), ratio=0.75)
    proof = psap.apply(model, plan).report["verification"]
    assert proof["modes"] == ("eval",) and proof["silent"] == ()


def test_statistics_come_near_those_of_the_data() -> None:
    model = _deep(1e-2).eval()
    model[1].running_mean.zero_()  # type: ignore[operator,union-attr]
    model[1].running_var.fill_(1.0)  # type: ignore[operator]
    with torch.no_grad(), settling.settling(model, True) as found:
        model(image())
    seen: dict[str, Tensor] = {}
    model[1].register_forward_hook(lambda _, args, out: seen.update(x=args[0], y=out))
    with torch.no_grad():
        model(image())
    torch.testing.assert_close(model[1].running_var, found["1"][1])
    assert bool((model[1].running_var / seen["x"].var((0, 2, 3))).log().abs().max() < 1)
    assert set(found) == {str(3 * at + 1) for at in range(12)}


def test_norms_at_a_single_position_do_not_magnify_rounding_errors() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        if m.training:
            raise RuntimeError("it cannot train, where norms would take statistics of the batch")
        return m.deep(x.mean((2, 3), keepdim=True))

    model = Net(body, deep=_deep(1.0, width=64)).eval()
    inputs = image(2, 3, 8, 8)
    plan = psap.plan(psap.trace(model, inputs), ratio=0.5)
    assert psap.apply(model, plan).report["verification"]["max_relative_error"] < 1e-12


DATA = ("zeros_like", "zero_", "ones_like", "full_like", "empty_like", "rand_like", "randn_like")
FUNCTIONS = sorted(
    str(packet).removeprefix("aten.")
    for packet, rule in RULES.items()
    if rule.__module__ == keeps_zero.__module__ and str(packet).removeprefix("aten.") not in DATA
)
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "clamp": (-1.0, 2.0), "clamp_min": (-1.0,), "clamp_max": (2.0,), "pow": (3.0,),
    "prelu": (torch.zeros(1).double(),), "_prelu_kernel": (torch.zeros(1).double(),),
    "native_dropout": (0.5, False), "dropout": (0.5, False),
    **dict.fromkeys(("add", "sub", "rsub"), (1.0,)),
    **dict.fromkeys(("maximum", "minimum"), (torch.tensor(0.5).double(),)),
    **dict.fromkeys(("mul", "div"), (2.0,)),
    "addcmul": (torch.tensor(0.5).double(), torch.tensor(0.5).double()),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_function_that_channels_may_run_through_is_flat(name: str) -> None:
    op, args = getattr(torch.ops.aten, name), ARGUMENTS.get(name.removesuffix("_"), ())
    ends = (0.01, 6) if name in ("sin", "cos") else (-20, 19.7)
    x = torch.linspace(*ends, 5000, dtype=torch.float64)
    with sloping.Sloping():
        y = op(x.clone(), *args)
    y = y[0] if isinstance(y, tuple) else y
    assert bool((y.diff() != 0).all())  # NaN, of roots and logarithms, counts as no difference


@pytest.mark.parametrize("name", sorted(k.removeprefix("aten.") for k in sloping._SLOPED))
def test_a_slope_keeps_what_zero_gives(name: str) -> None:
    op = getattr(torch.ops.aten, name, None)
    if op is None:
        return  # PyTorch has no such op in place
    args = ARGUMENTS.get(name.removesuffix("_"), ())
    args = (torch.tensor(0.0).double(),) if "imum" in name else args
    x = torch.tensor([-7.0, -1.5, 0.0, 0.3, 8.0]).double()
    with sloping.Sloping():
        y = op(x.clone(), *args)
    plain = op(x.clone(), *args)
    assert y[2] == plain[2]
    assert bool((y != plain)[x != 0].all())
    outer = torch.tensor([1, 2, 3])
    with sloping.Sloping():
        assert torch.equal(outer.clamp(min=2), torch.tensor([2, 2, 3]))  # no floating numbers
