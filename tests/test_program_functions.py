"""Programs keep the gradients of autograd functions that the user has written."""

from __future__ import annotations

import copy
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import assert_exact, image
from test_program_contexts import _apply, _assert_same_gradients, _fixed, _net
from torch import Tensor, nn

import psap


class _Round(torch.autograd.Function):
    """Rounds, and passes gradients straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        return (x * scale).round() / scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Halves(torch.autograd.Function):
    """Two results; the gradient of one is reversed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return x / 2, x / 2

    @staticmethod
    def backward(ctx: Any, one: Tensor, other: Tensor) -> Tensor:
        return one / 2 - other


def _straight(m: Any, x: Tensor) -> Tensor:
    return m.last(_Round.apply(_fixed(m.one(m.stem(x))), 16.0))


def _reversed(m: Any, x: Tensor) -> Tensor:
    one, other = _Halves.apply(_fixed(m.one(m.stem(x))))
    return m.last(one + other.relu())


def _without(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = _Round.apply(m.stem(x), 16.0)
    return m.last(_Round.apply(_fixed(m.one(y)), 16.0))


BODIES = (_straight, _reversed, _without)


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_gradients_are_those_that_the_function_says(body: Any) -> None:
    model = _net(body)
    apply = vars(torch.autograd.Function)["apply"]
    plan, small = _apply(model)
    assert vars(torch.autograd.Function)["apply"] is apply
    got = _assert_same_gradients(model, plan, small)
    assert got["one.weight"] is not None and got["one.weight"].any()
    assert_exact(model, plan, small.zero_grad() or small, (image(),))


def test_copies_pickles_and_files(tmp_path: Path) -> None:
    model = _net(_straight)
    plan = psap.plan(psap.trace(model, image()), ratio=0.5)
    result = psap.apply(model, plan)
    psap.save(result, tmp_path / "small.safetensors")
    loaded = psap.load(tmp_path / "small.safetensors", lambda: _net(_straight))
    pickled = ForkingPickler.loads(ForkingPickler.dumps(result.model))
    for small in (copy.deepcopy(result.model), pickled, loaded):
        _assert_same_gradients(model, plan, small)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch
def test_torch_compile() -> None:
    small = _apply(_net(_straight))[1]
    small(image()).sum().backward()
    wanted = {name: p.grad for name, p in small.named_parameters()}
    small.zero_grad()
    torch.compile(small, backend="eager", fullgraph=True)(image()).sum().backward()
    for name, parameter in small.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name])


def _local() -> Callable[[nn.Module, Tensor], Tensor]:
    class Local(_Round):
        pass

    return lambda m, x: m.last(Local.apply(_fixed(m.one(m.stem(x))), 16.0))


def test_one_that_a_program_cannot_name_is_refused() -> None:
    from psap.symbolic import traced

    with pytest.raises(psap.VerificationError, match=r"Local would be lost.*define it in a module"):
        traced(_net(_local()), {})
