"""Programs keep the blocks of forward() that switch autocast, and are exported with all blocks."""

from __future__ import annotations

import copy
import warnings
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import image
from test_program_contexts import (
    _apply,
    _assert_same_gradients,
    _fixed,
    _frozen_stem,
    _nested,
    _net,
)
from torch import Tensor, nn
from torch.nn import functional as F

import psap


class _Seen(nn.Module):
    """Notes the dtype of a matrix product, which autocast decides on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x)
        self.seen.append(out.dtype)
        return out


def _rows(m: Any, x: Tensor) -> Tensor:
    return _fixed(m.one(m.stem(x))).mean((2, 3))


def _island(m: Any, x: Tensor) -> Tensor:
    y = m.outer(_rows(m, x))
    with torch.autocast("cpu", enabled=False):
        y = m.inner(y.to(m.inner.linear.weight.dtype))
    return m.outer(y)


def _island_by_device(m: Any, x: Tensor) -> Tensor:
    y = m.outer(_rows(m, x))
    with torch.autocast(device_type=x.device.type, enabled=False):
        y = m.inner(y.to(m.inner.linear.weight.dtype))
    return m.outer(y)


def _of_the_caller(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        y = m.outer(_rows(m, x).to(m.inner.linear.weight.dtype))
        with torch.autocast("cpu"):
            y = m.inner(y)
        return m.outer(y.to(m.inner.linear.weight.dtype))


def _with_dtype(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.float16), torch.no_grad():
        y = m.inner(_rows(m, x))
    return m.outer(y.to(m.inner.linear.weight.dtype))


@torch.autocast("cpu", enabled=False)
def _inner_alone(m: Any, y: Tensor) -> Tensor:
    return m.inner(y.to(m.inner.linear.weight.dtype))


def _decorated_island(m: Any, x: Tensor) -> Tensor:
    return m.outer(_inner_alone(m, _rows(m, x)))


ISLANDS = (_island, _island_by_device, _of_the_caller, _with_dtype, _decorated_island)


def _cast(body: Any) -> nn.Module:
    return _net(body, inner=_Seen(), outer=_Seen()).float()


def _dtypes(model: nn.Module, dtype: torch.dtype | None) -> list[list[torch.dtype]]:
    model.inner.seen, model.outer.seen = [], []
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        model(image().float())
        assert torch.is_autocast_enabled("cpu") is (dtype is not None)
    return [model.inner.seen, model.outer.seen]


def _small(model: nn.Module) -> nn.Module:
    plan = psap.plan(psap.trace(model, image().float()), ratio=0.5)
    result = psap.apply(model, plan)
    assert result.mode == "graph"
    return result.model


@pytest.mark.parametrize("body", ISLANDS, ids=lambda body: body.__name__)
def test_islands_compute_in_the_dtype_of_the_dense_network(body: Any) -> None:
    model = _cast(body)
    small = _small(model)
    reloaded = ForkingPickler.loads(ForkingPickler.dumps(small))
    for network in (small, copy.deepcopy(small), reloaded):
        for dtype in (None, torch.bfloat16, torch.float16):
            assert _dtypes(network, dtype) == _dtypes(model, dtype)
    assert _dtypes(small, torch.bfloat16)[0] != _dtypes(small, torch.bfloat16)[1]


def test_gradients_of_an_island() -> None:
    model = _cast(_island)
    plan = psap.plan(psap.trace(model, image().float()), ratio=0.5)
    small = psap.apply(model, plan).model
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted, got = (net(image().float()) for net in (psap.mask(model, plan), small))
    assert got.dtype == wanted.dtype
    torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.05)
    got.float().sum().backward()
    assert small.stem.weight.grad is not None and small.inner.linear.weight.grad is not None


def test_an_error_in_an_island_leaves_autocast_as_it_was() -> None:
    small = _small(_cast(_island))

    def fail(*_: Any) -> None:
        raise KeyError("inside")

    small.inner.register_forward_hook(fail)
    for enabled in (True, False):
        with torch.autocast("cpu", enabled=enabled):
            with pytest.raises(KeyError, match="inside"):
                small(image().float())
            assert torch.is_autocast_enabled("cpu") is enabled


def test_an_island_of_float32_is_proved_in_float64() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y = _rows(m, x)
        with torch.autocast("cpu", enabled=False):
            y = F.layer_norm(m.inner(y.float()).float(), (8,)).type_as(y)
        return m.outer(y)

    model = _cast(body)
    small = _small(model)
    assert _dtypes(small, torch.bfloat16) == _dtypes(model, torch.bfloat16)


def test_an_island_of_another_device_is_kept_without_a_warning() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cuda", enabled=False):
            return m.last(_fixed(m.one(m.stem(x))))

    model = _net(body)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan, small = _apply(model)
    assert "with torch.autocast('cuda', None, False, None):" in small.code
    _assert_same_gradients(model, plan, small)


def _product(m: Any, x: Tensor) -> Tensor:
    y = _rows(m, x)
    with torch.autocast("cpu", enabled=False):
        return F.linear(y.float(), m.weight)


def test_torch_compile_keeps_an_island() -> None:
    small = _small(_net(_product, weight=nn.Parameter(torch.rand(8, 8))).float())
    compiled = torch.compile(small, backend="eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compiled(image().float()).dtype == small(image().float()).dtype == torch.float32


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (_frozen_stem, "onnx"),
        (_frozen_stem, "pt2"),
        (_nested, "onnx"),  # the other format has no gradients within such a block
        (_product, "onnx"),
        (_product, "pt2"),
    ],
)
def test_exports_of_blocks(body: Any, kind: str, tmp_path: Path) -> None:
    if kind == "onnx":
        pytest.importorskip("onnxscript")
    model = _net(body, weight=nn.Parameter(torch.rand(8, 8))).float()
    plan = psap.plan(psap.trace(model, image().float()), ratio=0.5)
    result = psap.apply(model, plan)
    assert result.mode == "graph"
    export = psap.export_onnx if kind == "onnx" else psap.export_pt2
    assert export(result, tmp_path / f"small.{kind}") is not None
