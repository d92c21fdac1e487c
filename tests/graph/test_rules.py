"""Every construct: the groups that the graph finds, why the rest is left alone, and exactness."""

from __future__ import annotations

import pytest
import torch
from nets import Net, assert_exact, assert_same, conv, head, image, randomise, snapshot
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import CASES, Case
from zoo_nets import block

import psap


@pytest.mark.parametrize("name", CASES)
def test_groups_and_reasons(name: str) -> None:
    case = CASES[name]
    graph = psap.trace(randomise(case.make()), case.inputs)
    assert {group.name: group.size for group in graph.groups} == case.groups
    assert graph.left_alone.keys() == case.alone.keys()
    for layer, part in case.alone.items():
        assert part in graph.left_alone[layer]


@pytest.mark.parametrize("name", CASES)
def test_half_of_the_channels_is_exact(name: str) -> None:
    case = CASES[name]
    model = randomise(case.make())
    before = snapshot(model)
    plan = psap.plan(psap.trace(model, case.inputs), ratio=0.5)
    result = psap.apply(model, plan)
    assert_same(before, snapshot(model))
    assert result.mode == case.mode
    assert result.report["verification"]["modes"] == ("eval", "train")
    assert [len(g.kept) for g in plan.groups] == [n - n // 2 for n in case.groups.values()]
    assert_exact(model, plan, result.model, case.inputs)
    assert list(result.model.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.mode == "module"])
def test_the_small_module_trains(name: str) -> None:
    case = CASES[name]
    model = randomise(case.make())
    small = psap.apply(model, psap.plan(psap.trace(model, case.inputs), ratio=0.5)).model
    _every_parameter_moves(small, case)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.mode == "graph"])
def test_the_small_program_trains(name: str) -> None:
    case = CASES[name]
    model = randomise(case.make())
    small = psap.apply(model, psap.plan(psap.trace(model, case.inputs), ratio=0.5)).model
    assert any(isinstance(module, torch.fx.GraphModule) for module in small.modules())
    _every_parameter_moves(small, case)


def _every_parameter_moves(small: nn.Module, case: Case) -> None:
    from psap.graph.trace import output_tensors

    small.train()
    before = {name: p.detach().clone() for name, p in small.named_parameters()}
    optimizer = torch.optim.SGD(small.parameters(), lr=0.5)
    sum(out.square().mean() for out in output_tensors(small(*case.inputs))).backward()  # type: ignore[union-attr]
    optimizer.step()
    for name, parameter in small.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
        if float(parameter.grad.abs().max()) > 1e-9:  # a bias in front of a norm has none
            assert not torch.equal(parameter, before[name]), name


def test_instance_norm_without_parameters_is_exact() -> None:
    model = randomise(
        block(
            8,
            lambda m, x: F.relu(F.instance_norm(m.one(x))),
            one=conv(8, 10),
            last=conv(10, 6),
        )
    )
    graph = psap.trace(model, image())
    assert {group.name: group.size for group in graph.groups} == {"stem": 8, "one": 10, "last": 6}
    plan = psap.plan(graph, ratio=0.5)
    assert_exact(model, plan, psap.apply(model, plan).model, (image(),))


def _body_case(body, gated: bool = False, **parts) -> psap.Graph:  # type: ignore[no-untyped-def]
    model = randomise(block(8, body, one=conv(8, 8), **parts))
    return psap.trace(model, image(), gated=gated)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (lambda m, x: m.one(x).exp(), "after exp"),
        (lambda m, x: 1 - m.one(x), "after subtraction from a constant"),
        (lambda m, x: m.one(x).clamp(min=0.5), "after clamp"),
        (lambda m, x: F.softplus(m.one(x)), "after softplus"),
        (lambda m, x: F.pad(m.one(x), (1, 1, 1, 1), value=1.0), "after padding with a constant"),
        (lambda m, x: m.one(x) / m.one(x).square(), "a channel is divided by"),
        (lambda m, x: m.one(x).pow(-2), "after pow"),
        (lambda m, x: m.one(x).cos(), "after cos"),
        (lambda m, x: m.one(x).mean(1, keepdim=True).expand(-1, 8, -1, -1), "reduced over"),
        (lambda m, x: m.one(x).softmax(1), "softmax over the channels"),
        (lambda m, x: m.one(x).sort(1).values, "no rule for aten.sort"),
        (lambda m, x: torch.clamp(m.one(x), max=x), "several tensors"),
        (lambda m, x: F.pad(m.one(x), (0, 0, 0, 0, -2, 2)), "padding that removes channels"),
        (lambda m, x: F.max_pool3d(m.one(x)[:, None], (2, 1, 1))[:, 0].repeat(1, 2, 1, 1), "a po"),
        (lambda m, x: F.conv2d(x, m.one.weight, m.one.bias * 2, padding=1), "a bias that is comp"),
        (lambda m, x: m.one(x) * torch.ones(8, 1, 1, dtype=x.dtype), "fixed number of channels"),
        (lambda m, x: F.layer_norm(m.one(x), (8, 8, 8)), "layer norm over the channels"),
        (lambda m, x: F.group_norm(m.one(x), 2), "group norm over several"),
        (lambda m, x: m.norm(m.one(x).movedim(1, -1)).movedim(-1, 1), "layer norm over the ch"),
        (lambda m, x: m.one(x).sigmoid(), "after sigmoid"),
        (lambda m, x: m.one(x) + 1, "after add of a constant"),
        (lambda m, x: torch.addmm(x.mean((2, 3)), m.one(x).mean((2, 3)), torch.ones(8, 8).double())
         [:, :, None, None], "a product of two activations"),
    ],
)  # fmt: skip
def test_a_gated_trace_leaves_alone_with_the_reason(body, why: str) -> None:  # type: ignore[no-untyped-def]
    graph = _body_case(body, gated=True, norm=nn.LayerNorm(8))
    assert "one" not in {group.name for group in graph.groups}
    assert why in graph.left_alone["one"]
    plan = psap.plan(graph, ratio=0.5)
    model = graph.model
    assert_exact(model, plan, psap.apply(model, plan).model, (image(),))


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: F.gelu(m.one(x)),
        lambda m, x: F.hardswish(m.one(x)).tanh().relu().sqrt(),
        lambda m, x: F.elu(m.one(x)).abs().pow(2),
        lambda m, x: m.one(x).clamp(-1, 1) / 3,
        lambda m, x: m.one(x) / (1 + m.one(x).square()),
        lambda m, x: m.one(x) * m.one(x).flatten(2).softmax(2).view_as(x),
        lambda m, x: m.one(x)[:, :, torch.tensor([1, 0, 3, 2, 4, 5, 6, 7])],
        lambda m, x: F.interpolate(m.one(x), scale_factor=2, mode="bilinear"),
        lambda m, x: F.interpolate(m.one(x), scale_factor=2),
        lambda m, x: F.max_pool2d(m.one(x), 2) + F.avg_pool2d(m.one(x), 2),
        lambda m, x: F.pad(m.one(x), (1, 1, 1, 1)) * x.amax((2, 3), keepdim=True),
        lambda m, x: F.pad(m.one(x), (1, 1, 1, 1), mode="reflect"),
        lambda m, x: m.one(x) * F.adaptive_max_pool2d(x, 1).sigmoid(),
        lambda m, x: m.one(x).flatten(2).transpose(1, 2).unflatten(1, (8, 8)).movedim(-1, 1),
        lambda m, x: m.one(x).flip(2).roll(1, 3),
        lambda m, x: torch.maximum(m.one(x), x),
        lambda m, x: m.one(x) - x.mean((2, 3), keepdim=True),
        lambda m, x: m.one(x) * (m.one(x).sum(1, keepdim=True)),
        lambda m, x: m.one(x) * x.std((2, 3), keepdim=True),
        lambda m, x: torch.cat([m.one(x), x], 2),
        lambda m, x: m.one(x).detach().clone().contiguous(),
    ],
)
def test_zero_preserving_bodies_are_pruned(body) -> None:  # type: ignore[no-untyped-def]
    graph = _body_case(body)
    assert "one" in {layer for group in graph.groups for layer in group.layers}
    assert "one" not in graph.left_alone
    plan = psap.plan(graph, ratio=0.5)
    model = graph.model
    assert_exact(model, plan, psap.apply(model, plan).model, (image(),))


def test_a_frozen_backbone_is_left_alone_and_named() -> None:
    model = CASES["residual"].make()
    model.one.weight.requires_grad_(False)  # type: ignore[union-attr]
    graph = psap.trace(model.double(), image())
    assert {group.name for group in graph.groups} == {"last"}
    for layer in ("stem", "one"):
        assert graph.left_alone[layer] == "one.weight is frozen (requires_grad is False)"


def test_pooling_positions_that_are_returned_do_not_break_the_shapes() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv(3, 8), conv(3, 8)
            self.head = head(8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            _, positions = F.max_pool2d(self.a(x), 2, return_indices=True)
            return self.head(self.b(x)), positions

    graph = psap.trace(randomise(Pooled()), image())
    assert {group.name for group in graph.groups} == {"b"}
    assert graph.left_alone["a"] == "output of the model"


def test_two_groups_of_one_layer_are_told_apart() -> None:
    graph = psap.trace(randomise(CASES["slices"].make()), image())
    sizes = {group.name: group.size for group in graph.groups}
    assert (sizes["stem"], sizes["stem#2"]) == (3, 5)
    stem = graph.channels["stem.weight", 0]
    assert len(set(stem.tolist())) == 8
    assert stem[:3].max() < 3 <= stem[3:].min()


def test_counts_of_positions_per_channel() -> None:
    graph = psap.trace(randomise(CASES["flatten"].make()), image())
    stem = next(group for group in graph.groups if group.name == "stem")
    assert stem.sides["fc.weight", 1] == 64
    assert stem.sides["stem.weight", 0] == stem.sides["stem.bias", 0] == 1
    assert stem.producers == ("stem.weight",)
    assert stem.layers == ("stem", "fc")


def test_a_body_without_fixed_widths_takes_other_shapes() -> None:
    net = Net(lambda m, x: m.head(F.relu(m.stem(x))), stem=conv(3, 8), head=head(8))
    model = randomise(net)
    plan = psap.plan(psap.trace(model, image(1, 3, 8, 8)), ratio=0.25)
    small = psap.apply(model, plan).model
    assert_exact(model, plan, small, (image(3, 3, 12, 20),))
