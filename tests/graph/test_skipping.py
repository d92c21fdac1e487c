"""The pass over heads of train mode computes no convolution, unless forward() asks for values."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import Net, conv, head, image, randomise
from torch import Tensor, nn
from torch.nn import functional as F

import psap
from psap.graph.skipping import ValueAsked, skipping

CONVOLUTION = torch.ops.aten.convolution.default


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
        (nn.Conv2d(4, 6, (1, 3), stride=(2, 1), padding=(0, 2), dilation=2), (2, 4, 9, 8)),
        (nn.Conv2d(4, 6, 2, groups=2, padding=3), (2, 4, 9, 8)),
        (nn.Conv3d(4, 2, 3, padding=(1, 0, 2)), (1, 4, 5, 6, 7)),
        (nn.ConvTranspose1d(4, 6, 3, stride=3, output_padding=2), (2, 4, 5)),
        (nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2, dilation=2, bias=False), (2, 4, 5, 6)),
    ],
)
def test_zeros_have_the_shape_of_the_result(layer: nn.Module, shape: tuple[int, ...]) -> None:
    asked: list[Any] = []

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            if func is CONVOLUTION:
                asked.append((args, out))
            return out

    with torch.no_grad(), Seen():
        layer(torch.randn(shape))
    ((args, wanted),) = asked
    got = skipping(CONVOLUTION, args, {})
    assert (got.shape, got.stride(), got.dtype) == (wanted.shape, wanted.stride(), wanted.dtype)
    assert not got.any() and wanted.any()


def test_another_order_in_memory_is_computed() -> None:
    layer, x = conv(4, 6), torch.randn(2, 4, 5, 6).to(memory_format=torch.channels_last)
    args = (x, layer.weight, layer.bias, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    with torch.no_grad():
        assert torch.equal(skipping(CONVOLUTION, args, {}), layer(x))


@pytest.mark.parametrize("name", ["nonzero", "_local_scalar_dense"])
def test_values_that_come_out_end_the_pass(name: str) -> None:
    with pytest.raises(ValueAsked, match=f"^aten.{name}.default makes values known"):
        skipping(getattr(torch.ops.aten, name).default, (torch.ones(1),), {})


def _aux(ask: Callable[[Tensor], Any]) -> nn.Module:
    """A network with another head in train mode, which only what `ask` says leads to."""

    def body(m: Any, x: Tensor) -> Any:
        x = F.relu(m.stem(x))
        if m.training:
            return m.head(x), m.heads[1 if ask(m.gate(x)) else 0](x)
        return m.head(x)

    heads = nn.ModuleList(nn.Sequential(conv(8, 6), nn.ReLU(), head(6)) for _ in range(2))
    model = randomise(Net(body, stem=conv(3, 8), gate=conv(8, 8), head=head(8), heads=heads))
    with torch.no_grad():
        model.gate.bias.fill_(100)  # type: ignore[union-attr,operator]
    return model


def _nothing(x: Tensor) -> bool:
    return True


ASKING = {
    "nothing": _nothing,
    "a branch": lambda x: x.mean() > 1,
    "a number": lambda x: float(x[0, 0, 0, 0]) > 1,
    "a list": lambda x: x[0, 0, 0].tolist()[0] > 1,
    "an array": lambda x: x.numpy().mean() > 1,
    "places": lambda x: len((x > 1).nonzero()) > 0,
    "a mask": lambda x: x[x > 1].numel() > 0,
}  # fmt: skip


@pytest.mark.parametrize("name", ASKING)
def test_forward_takes_the_branch_of_its_values(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("psap.graph.trace")
    zeros: list[bool] = []

    def seen(func: Any, args: Any, kwargs: Any) -> Any:
        out = skipping(func, args, kwargs)
        if func is CONVOLUTION:
            zeros.append(not out.any())
        return out

    monkeypatch.setattr(module, "skipping", seen)
    model = _aux(ASKING[name])
    graph = psap.trace(model, image())
    assert all(zeros) and len(zeros) == (3 if name == "nothing" else 2)
    reached = {group.name for group in graph.groups}
    assert "heads.1.0" in reached and "heads.0.0" not in reached


def test_what_fails_on_zeros_is_computed() -> None:
    def body(m: Any, x: Tensor) -> Any:
        x = F.relu(m.stem(x))
        if m.training:
            torch.linalg.inv(m.gate(x))  # of zeros there is none
            return m.head(x), m.aux(x)
        return m.head(x)

    model = randomise(Net(body, stem=conv(3, 8), gate=conv(8, 8), head=head(8), aux=head(8)))
    graph = psap.trace(model, image())
    assert "output of the model" in {graph.left_alone[n] for n in graph.left_alone if "aux" in n}


def test_a_product_of_activations_reads_its_factors() -> None:
    """Queries and keys have no weight behind them, but train mode need not be traced for that."""
    modes: list[bool] = []

    def attend(m: Any, x: Tensor) -> Tensor:
        q, k = (layer(x).flatten(2) for layer in (m.q, m.k))
        return (q.transpose(1, 2) @ k).softmax(-1)[:, None]

    def body(m: Any, x: Tensor) -> Tensor:
        modes.append(m.training)
        return m.head(m.attend(x))

    inner = Net(attend, q=conv(3, 8), k=conv(3, 8))
    graph = psap.trace(randomise(Net(body, attend=inner, head=head(1))), image())
    assert [(group.name, group.size) for group in graph.groups] == [("attend.q", 8)]
    assert modes == [False]
