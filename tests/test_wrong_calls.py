"""Calls that are not taken show the right one, and what cannot be done says what can."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pruner_nets import Chain, inputs, make
from torch import Tensor, nn

import psap

CALLS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], str]] = {
    "trace": (psap.trace, (Chain(),), {}, r"'example_inputs'; call psap\.trace\(model, example"),
    "mask": (psap.mask, (Chain(),), {}, r"'plan'; call psap\.mask\(model, plan\)"),
    "save": (psap.save, (), {"file": "x"}, r"call psap\.save\(result, path\)"),
    "load": (psap.load, ("x",), {}, r"'factory'; call psap\.load\(path, factory\), where factory"),
    "times": (psap.measure_latency, (), {}, r"'graph'; call psap\.measure_latency\(graph, path\)"),
    "onnx": (psap.export_onnx, (1, 2), {"dynamic": 1}, r"call psap\.export_onnx\(result, path\)"),
    "pt2": (psap.export_pt2, (1,), {}, r"'path'; call psap\.export_pt2\(result, path\)"),
}


@pytest.mark.parametrize("name", CALLS)
def test_wrong_calls_show_the_right_one(name: str) -> None:
    call, args, options, match = CALLS[name]
    with pytest.raises(psap.ArgumentTypeError, match=match):
        call(*args, **options)


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda p: torch.save(p, io.BytesIO())]
)
def test_a_pruner_is_not_copied(copied: Callable[[Any], Any]) -> None:
    _, _, pruner = make("chain")
    with pytest.raises(psap.StateError, match=r"neither copied nor pickled.*state_dict\(\)"):
        copied(pruner)


class Centred(nn.Module):
    """Graph mode cannot follow its forward(), and a mean over channels counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = x - x.mean(1, keepdim=True)
        y: Tensor = self.conv2(x)
        return y if bool(y.isfinite().all()) else y.nan_to_num()


def test_a_refusal_because_norms_count_names_the_way_out() -> None:
    model = Centred()
    plan = psap.plan(psap.trace(model, torch.randn(2, 3, 8, 8)), ratio=0.5)
    with pytest.raises(psap.VerificationError, match=r"gated=True\) leaves alone what norms count"):
        psap.apply(model, plan)


class Picture(Tensor):
    """A tensor with methods of its own, which all results keep."""


def test_inputs_of_a_subclass_that_adds_methods() -> None:
    model = Chain()
    graph = psap.trace(model, inputs().as_subclass(Picture))
    assert [type(x) for x in graph.inputs] == [Tensor]
    plan = psap.plan(graph, ratio=0.5)
    assert plan == psap.plan(psap.trace(model, inputs()), ratio=0.5)
    assert psap.apply(model, plan).mode == "module"
