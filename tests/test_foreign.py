"""Models that are compiled, scripted or patched: a copy must run itself, or is refused."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pruner_nets import Chain, backward, inputs
from torch import Tensor, nn

import psap
from psap.copying import deep_copy

pytestmark = pytest.mark.usefixtures("dynamo")


def _halved(model: nn.Module, x: Tensor) -> psap.Result:
    return psap.apply(model, psap.plan(psap.trace(model, x), ratio=0.5))


def _equal_to_masked(model: nn.Module, result: psap.Result, x: Tensor) -> bool:
    masked = psap.mask(model, result.plan).eval()
    return torch.allclose(masked(x), result.model.eval()(x), atol=1e-6)


def _whole(model: Chain) -> None:
    model.compile(backend="eager")


def _part(model: Chain) -> None:
    model.conv2.compile(backend="eager")


@pytest.mark.parametrize("compile_", [_whole, _part])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_that_was_compiled_in_place(
    compile_: Callable[[Chain], None], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model, x = Chain().to(dtype), inputs().to(dtype)
    compile_(model)
    calls = [m._compiled_call_impl for m in model.modules()]
    result = _halved(model, x)
    assert result.model.conv2.out_channels == model.conv2.out_channels // 2
    assert all(m._compiled_call_impl is None for m in result.model.modules())
    assert [m._compiled_call_impl for m in model.modules()] == calls  # the caller's is as it was
    assert _equal_to_masked(model, result, x)
    assert not torch.allclose(model.eval()(x), result.model(x))  # which does not call the original


def test_a_copy_of_a_compiled_module_is_that_of_deepcopy() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model.compile(backend="eager")
    for made in (deep_copy(model, {}), copy.deepcopy(model)):
        assert made._compiled_call_impl is None


def test_a_compiled_model_trains_and_shrinks_in_place() -> None:
    torch.manual_seed(0)
    model = Chain()
    model.compile(backend="eager")
    opt = torch.optim.SGD(model.parameters(), 0.1)
    config = psap.Config(target=psap.Target(macs=0.4), prune_steps=1)
    pruner = psap.Pruner(model, inputs(), optimizer=opt, config=config)
    backward(model, opt, seed=0)
    opt.step()
    pruner.step()
    masked = copy.deepcopy(model).eval()(inputs())
    assert pruner.finish(inplace=True).model is model
    assert torch.allclose(model.eval()(inputs()), masked, atol=1e-6)


def _lambda(model: Any) -> None:
    forward = model.conv2.forward
    model.conv2.forward = lambda x: 2 * forward(x)


def _compiled(model: Any) -> None:
    model.forward = torch.compile(model.forward, backend="eager")


@pytest.mark.parametrize("patch", [_lambda, _compiled])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_copy_that_would_call_the_original_is_refused(
    patch: Callable[[Any], None], dtype: torch.dtype
) -> None:
    model = Chain().to(dtype)
    patch(model)
    with pytest.raises(
        psap.ArgumentError, match=r"^a copy of the model still uses conv[12]\.weight"
    ):
        _halved(model, inputs().to(dtype))


def test_a_forward_that_is_bound_to_the_module_is_copied_with_it() -> None:
    torch.manual_seed(0)
    model: Any = Chain()
    forward = type(model.conv2).forward
    model.conv2.forward = types.MethodType(lambda self, x: 2 * forward(self, x), model.conv2)
    assert _equal_to_masked(model, _halved(model, inputs()), inputs())
