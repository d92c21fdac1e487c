"""Programs pass for the modules that they stand for: attributes, classes, copies and pickles."""

from __future__ import annotations

import copy
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from nets import Net, assert_exact, conv, image, randomise
from test_program import _apply, _around, _Gated
from torch import Tensor, nn

import psap
from psap.models import resnet20


class _Layers(nn.Module):
    """Runs its layers in a list and looks at what was noted on each, as parsers of models do."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        for number, layer in enumerate(layers):
            layer.number, layer.kept = number, [number % 2 == 0]

    def forward(self, x: Tensor) -> Tensor:
        saved: list[Tensor] = []
        for layer in self.layers:
            x = layer(x, None) if isinstance(layer, _Gated) else layer(x)
            saved += [x] * layer.kept[0]
            assert layer.number < len(self.layers)
        return torch.cat([x.mean((2, 3)), saved[-1].mean((2, 3))], 1)


def test_programs_that_share_code_keep_attributes_of_their_own() -> None:
    model = randomise(_Layers(conv(3, 8), _Gated(), conv(8, 8), _Gated(), conv(8, 5)))
    small = psap.apply(model, psap.plan(psap.trace(model, image()), ratio=0.5)).model
    for net in (small, copy.deepcopy(small)):
        assert [(at, *layer.kept) for at, layer in enumerate(net.layers)] == [
            (layer.number, at % 2 == 0) for at, layer in enumerate(net.layers)
        ]
    assert sum(isinstance(layer, torch.fx.GraphModule) for layer in small.layers) == 2


@pytest.mark.parametrize("inplace", [False, True])
def test_a_program_keeps_what_others_read_of_its_module(inplace: bool) -> None:
    model = randomise(_Layers(conv(3, 8), _Gated(), conv(8, 8), conv(8, 5)))
    name = _Gated.__name__
    plan = psap.plan(psap.trace(model, image()), ratio=0.5)
    before = copy.deepcopy(model)
    small = psap.apply(model, plan, inplace=inplace).model
    program = small.layers[1]
    assert isinstance(program, torch.fx.GraphModule)
    again = copy.deepcopy(copy.deepcopy(small))
    loaded = copy.deepcopy(ForkingPickler.loads(ForkingPickler.dumps(small)))
    for net in (small, again, loaded):
        assert (net.layers[1].number, net.layers[1].kept) == (1, [False])
        assert isinstance(net.layers[1], _Gated) and isinstance(net.layers[1], torch.fx.GraphModule)
        assert_exact(before, plan, net, (image(),))
    assert again.layers[1].kept is not program.kept
    assert _Gated.__name__ == name


@pytest.mark.parametrize("local", [False, True])
def test_a_program_of_a_class_that_cannot_be_imported_is_pickled(local: bool) -> None:
    kind = type("Hidden", (_Gated,), {}) if local else _Gated
    part = _apply(_around(kind()), "auto").model.inner
    again = ForkingPickler.loads(ForkingPickler.dumps(part))
    x = torch.rand(1, part.conv.in_channels, 8, 8, dtype=torch.float64)
    assert isinstance(part, kind) and isinstance(again, _Gated) is not local
    assert torch.equal(again(x), part(x))


def test_a_program_hands_out_lists_that_others_may_change() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = conv(4, 3, 1)

        def forward(self, maps: list[Tensor]) -> list[Tensor]:
            for at in range(len(maps)):
                maps[at] = self.one(maps[at])
            return maps

    def body(m: Any, x: Tensor) -> Tensor:
        a, b = m.stem(x).split([4, 4], 1)
        return torch.cat(m.heads([a, m.deep(b)]), 1)

    model = randomise(Net(body, stem=conv(3, 8), deep=conv(4, 4), heads=Heads()))
    plan = psap.plan(psap.trace(model, image()), ratio=0.5)
    assert_exact(model, plan, psap.apply(model, plan).model, (image(),))


class _Frozen(_Gated):
    """Has what models have beside a forward: a constant, a property, a method, a way to train."""

    expansion = 4

    @property
    def width(self) -> int:
        return int(self.conv.out_channels)

    @staticmethod
    def named(kind: str) -> str:
        return f"a {kind}"

    def describe(self) -> str:
        return f"{self.named('block')} of {self.width}"

    def train(self, mode: bool = True) -> _Frozen:
        super().train(mode)
        self.conv.eval()
        return self

    def __len__(self) -> int:
        return 7


def _around_frozen() -> Any:
    model = randomise(_Layers(conv(3, 8), _Frozen(), conv(8, 5)))
    return psap.apply(model, psap.plan(psap.trace(model, image()), ratio=0.5)).model


def test_a_program_has_the_properties_and_methods_of_the_class_it_stands_for() -> None:
    small = _around_frozen()
    assert isinstance(small.layers[1], torch.fx.GraphModule)
    loaded = ForkingPickler.loads(ForkingPickler.dumps(small))
    for net in (small, copy.deepcopy(small), copy.deepcopy(loaded)):
        part = net.layers[1]
        assert part.width == part.conv.out_channels < _Frozen().width
        assert (part.describe(), part.expansion, len(part)) == (f"a block of {part.width}", 4, 7)
        net.train()
        assert part.training and not part.conv.training
        assert not hasattr(part, "of_no_one")
        with pytest.raises(AttributeError, match="of_no_one"):
            part.of_no_one  # noqa: B018


def test_programs_of_different_classes_do_not_share_what_these_define() -> None:
    model = _Layers(conv(3, 8), _Gated(), conv(8, 8), _Frozen(), conv(8, 5))
    small = psap.apply(
        randomise(model), psap.plan(psap.trace(model, image()), ratio=0.5), mode="graph"
    ).model
    assert small.layers[3].expansion == 4
    assert not hasattr(small.layers[1], "expansion")


def test_a_program_that_is_pruned_again_stands_for_the_same_class() -> None:
    first = _around_frozen()
    graph = psap.trace(first, image())
    small = psap.apply(first, psap.plan(graph, ratio=0.5), mode="graph").model
    part = small.layers[1]
    assert isinstance(part, torch.fx.GraphModule) and part.conv.in_channels == 2
    assert part.__class__.__mro__[1] is _Frozen
    assert part.width == part.conv.out_channels == 2


def test_a_class_that_counts_its_subclasses_gets_no_more_of_them() -> None:
    seen: list[type] = []

    class Counted(_Gated):
        def __init_subclass__(cls) -> None:
            seen.append(cls)

    part = _apply(_around(Counted()), "graph").model.inner
    assert isinstance(part, torch.fx.GraphModule) and part.__class__ is Counted
    assert seen == []


def test_programs_are_exported_and_compiled() -> None:
    small = _around_frozen()
    x = image()
    exported = torch.export.export(small.eval(), (x,)).module()
    assert torch.equal(exported(x), small(x))
    for mode in (True, False):
        small.train(mode).zero_grad()
        compiled = torch.compile(small, backend="aot_eager", fullgraph=True)
        out, wanted = compiled(x), small(x)
        assert torch.allclose(out, wanted, atol=1e-12)
        [wanted_grad] = torch.autograd.grad(wanted.sum(), [small.layers[0].weight])
        out.sum().backward()
        assert torch.allclose(small.layers[0].weight.grad, wanted_grad, atol=1e-12)


def test_a_network_with_padded_shortcuts_is_compiled_after_pruning() -> None:
    model, x = randomise(resnet20(num_classes=4)), image(2, 3, 16, 16)
    small = psap.apply(model, psap.plan(psap.trace(model, x), ratio=0.5)).model.eval()
    compiled = torch.compile(small, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), small(x))
