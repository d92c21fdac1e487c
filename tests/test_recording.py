"""Programs that run alone show what they show in a pass of the whole model."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from nets import Net, assert_exact, conv, head, image, randomise
from test_program import FIXED
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import CASES

import psap

IMAGE = (image(),)


def _programs(model: nn.Module, plan: psap.Plan, inputs: Any = None) -> dict[str, Any]:
    """The code of every program, and the constants that only it has."""
    small = psap.apply(model, plan, mode="graph", check=False, example_inputs=inputs).model
    return {
        name: (
            part.code,
            {k: v.tolist() for k, v in part.named_buffers(recurse=False) if k.startswith("_ten")},
        )
        for name, part in small.named_modules()
        if isinstance(part, torch.fx.GraphModule)
    }


def _passes(model: nn.Module) -> list[Tensor]:
    """What the first layer of a model is called with from now on."""
    found: list[Tensor] = []
    model[0].register_forward_pre_hook(lambda m, args: found.append(args[0]))
    return found


def _around(inner: nn.Module, *more: nn.Module) -> nn.Module:
    return randomise(nn.Sequential(conv(3, 8), inner, *more, head(8)))


@pytest.mark.parametrize("name", FIXED)
def test_programs_alone_show_what_a_whole_pass_shows(name: str) -> None:
    model = _around(Net(FIXED[name], one=conv(8, 8)))
    plan = psap.plan(psap.trace(model, image()), ratio=0.5, score="random", seed=3)
    passes = _passes(model)
    alone = _programs(model, plan)
    assert not passes
    assert alone == _programs(model, plan, IMAGE)
    assert len(passes) == 1 and list(alone) == ["1"]
    assert_exact(model, plan, psap.apply(model, plan, mode="graph").model, IMAGE)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.mode == "graph"])
def test_constructs_alone(name: str) -> None:
    model = randomise(nn.Sequential(nn.Identity(), CASES[name].make()))
    plan = psap.plan(psap.trace(model, image()), ratio=0.5)
    passes = _passes(model)
    alone = _programs(model, plan)
    assert not passes
    assert alone == _programs(model, plan, IMAGE)
    assert len(passes) == 1 and alone


class _Doubled(nn.Module):
    """Norms in a block that is a program, too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.one = nn.LayerNorm([8, 8, 8]), nn.Linear(8, 8)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        y = self.norm(x).view(-1, 8, 64).transpose(1, 2)
        return x + self.one(y).transpose(1, 2).reshape(-1, 8, 8, 8) * scale


def test_a_program_in_a_program() -> None:
    model = _around(Net(lambda m, x: m.inner(x, scale=0.5) + m.inner.one.bias.view(-1, 1, 1),
                        inner=_Doubled()))  # fmt: skip
    plan = psap.plan(psap.trace(model, image()), ratio=0.5)
    passes = _passes(model)
    alone = _programs(model, plan)
    assert not passes and {"1.inner"} <= set(alone)
    assert alone == _programs(model, plan, IMAGE)


class _Wider(nn.Module):
    """Pads channels that only a sum outside of it makes some of the model."""

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, 2, 2))


def _padded() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        return m.pad(m.narrow(x)) + m.wide(x)

    return Net(body, pad=_Wider(), narrow=conv(8, 4), wide=conv(8, 8))


class _Fixed(nn.Module):
    def forward(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        x = x.view(-1, 8, 64).view(-1, 8, 8, 8)
        return x if index is None else x[index]


def _hooked() -> nn.Module:
    inner = _Fixed()
    inner.register_forward_pre_hook(lambda m, args: (args[0],))
    return inner


def _twice() -> nn.Module:
    inner = _Fixed()
    return nn.Sequential(inner, nn.ReLU(), inner)


def _indexed() -> nn.Module:
    order = torch.tensor([3, 1, 2, 0])
    return Net(lambda m, x: m.inner(x, m.order), inner=_Fixed(), order=order)


def _given_a_parameter() -> nn.Module:
    inner = Net(lambda m, w: w.view(8, 1).view(8, 1, 1))
    return Net(lambda m, x: x * m.inner(m.w), inner=inner, w=nn.Parameter(torch.ones(8)))


@pytest.mark.parametrize("make", [_padded, _hooked, _twice, _indexed, _given_a_parameter])
def test_what_cannot_be_told_alone_is_found_by_a_pass(make: Any) -> None:
    model = _around(make())
    plan = psap.plan(psap.trace(model, image()), ratio=0.5, score="random", seed=1)
    passes = _passes(model)
    small = psap.apply(model, plan, mode="graph", check=False).model
    assert len(passes) == 1
    assert any(isinstance(part, torch.fx.GraphModule) for part in small.modules())
    assert_exact(model, plan, small, IMAGE)


def test_a_model_of_another_dtype_than_it_was_traced_with() -> None:
    model = _around(Net(FIXED["view, packed"], one=conv(8, 8))).float()
    plan = psap.plan(psap.trace(model, image().float()), ratio=0.5)
    passes = _passes(model)
    psap.apply(model, plan, mode="graph", check=False)
    assert not passes
    small = psap.apply(model.double(), plan, mode="graph", check=False).model
    assert len(passes) == 1
    assert_exact(model, plan, small, IMAGE)


def test_nothing_is_left_in_the_model() -> None:
    model = _around(Net(FIXED["view, packed"], one=nn.Sequential(conv(8, 8), nn.BatchNorm2d(8))))
    plan = psap.plan(psap.trace(model.train(), image()), ratio=0.5)
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    psap.apply(model, plan, mode="graph", check=False)
    assert all(module.training for module in model.modules())
    assert "forward" not in vars(model[1])
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())


def test_programs_that_say_the_same_share_their_code_alone() -> None:
    model = _around(*(Net(FIXED["view, packed"], one=conv(8, 8)) for _ in range(3)))
    plan = psap.plan(psap.trace(model, image()), ratio={"1.one": 0.5, "2.one": 0.5, "3.one": 0.25})
    small = psap.apply(model, plan, mode="graph").model
    first, second, third = small[1], small[2], small[3]
    assert first.code == second.code != third.code
    assert_exact(model, plan, small, IMAGE)
    x = image(1, second.one.in_channels, 8, 8)
    kept = second(x)
    for node in first.graph.find_nodes(op="call_method", target="view"):
        node.args = (node.args[0], (-1,))
    first.recompile()
    assert first(image(1, first.one.in_channels, 8, 8)).dim() == 1
    assert torch.equal(second(x), kept)
    second.recompile()
    assert torch.equal(second(x), kept)


class _Counted(nn.Conv2d):
    """Notes that it runs."""

    runs: ClassVar[list[nn.Module]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.runs.append(self)
        return super().forward(x)


def test_modules_that_are_alike_run_once() -> None:
    def part() -> nn.Module:
        return Net(FIXED["split by size"], one=_Counted(8, 8, 3, padding=1))

    model = randomise(nn.Sequential(conv(3, 8), part(), part(), conv(8, 8), part(), head(8)))
    plan = psap.plan(psap.trace(model, image()), ratio=0.5, score="random", seed=5)
    kept = {side.kept for side in plan.sides if side.name.endswith("one.weight") and not side.dim}
    assert len(kept) == 3
    _Counted.runs.clear()
    alone = _programs(model, plan)
    assert _Counted.runs == [model[1].one]
    assert list(alone) == ["1", "2", "4"] and alone["1"] != alone["2"]
    assert alone == _programs(model, plan, IMAGE)
    assert_exact(model, plan, psap.apply(model, plan, mode="graph").model, IMAGE)
