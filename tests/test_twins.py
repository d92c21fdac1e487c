"""Modules that are built alike share one program; others do not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from nets import assert_exact, conv, head, image, randomise
from torch import Tensor, nn

import psap
from psap import program
from psap.twins import twins


class _Part(nn.Module):
    """Takes some of the channels, by a number that it holds."""

    def __init__(self, start: int = 2) -> None:
        super().__init__()
        self.one, self.start, self.options = (
            conv(8, 8),
            start,
            {"sizes": [start, 8], "act": torch.relu},
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.options["act"](self.one(x))
        return torch.cat([y[:, self.start :], x[:, : self.start]], 1)


def _grown(part: nn.Module) -> None:
    part.one = conv(8, 8, 1)


def _marked(part: nn.Module) -> None:
    part.options["sizes"].append(3)


def _called(part: nn.Module) -> None:
    part.options["act"] = torch.sigmoid


def _tied(part: nn.Module) -> None:
    part.two = part.one


def _hooked(part: nn.Module) -> None:
    part.one.register_forward_hook(lambda m, x, y: y + 1)


def _held(part: nn.Module) -> None:
    part.scale = torch.ones(1)


def _typed(part: nn.Module) -> None:
    part.start = 2.0


@pytest.mark.parametrize("change", [_grown, _marked, _called, _tied, _hooked, _held, _typed])
def test_modules_that_differ_are_no_twins(change: Any) -> None:
    model = nn.Sequential(_Part(), _Part(), _Part(), nn.ReLU())
    change(model[1])
    given: dict[str, Any] = {"0": {}, "1": {}, "2": {}, "3": {}}
    assert twins(model, given) == [["0", "2"], ["1"], ["3"]]


def test_children_that_are_one_are_not_two_alike() -> None:
    tied, apart = _Part(), _Part()
    tied.two = tied.one
    apart.two = copy.deepcopy(apart.one)
    assert twins(nn.Sequential(tied, apart), {"0": {}, "1": {}}) == [["0"], ["1"]]


def test_what_modules_are_called_with_counts() -> None:
    model = nn.Sequential(*(_Part() for _ in range(4)))
    wide = {"x": torch.empty(2, 3, device="meta")}
    given = {"0": {"x": None}, "1": {"x": False}, "2": wide, "3": dict(wide)}
    assert twins(model, given) == [["0"], ["1"], ["2", "3"]]


def test_twins_share_a_trace_and_are_cut_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[nn.Module] = []
    traced = program.traced

    def counted(module: nn.Module, *args: Any, **options: Any) -> Any:
        asked.append(module)
        return traced(module, *args, **options)

    monkeypatch.setattr(program, "traced", counted)
    starts = 2, 2, 5, 2
    model = randomise(nn.Sequential(conv(3, 8), *map(_Part, starts), head(8)))
    plan = psap.plan(psap.trace(model, image()), ratio=0.5)
    small = psap.apply(model, plan, mode="graph", check=False).model
    assert asked == [model[1], model[3]]
    assert all(isinstance(small[n], torch.fx.GraphModule) for n in (1, 2, 3, 4))
    assert_exact(model, plan, small, (image(),))
