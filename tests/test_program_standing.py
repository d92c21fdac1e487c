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
