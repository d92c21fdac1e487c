"""Quick walks and copies of a model give what PyTorch's own give."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from nets import conv, head
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from psap.copying import deep_copy
from psap.members import named_modules, named_tensors, set_training


class _Counted(nn.Module):
    """Buffers, None in all places, and objects that hold modules."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(2))
        self.register_buffer("hidden", torch.ones(1), persistent=False)
        self.register_buffer("absent", None)
        self.register_parameter("bias", None)
        self.child = None
        self.add_module("none", None)
        self.inner = nn.Linear(2, 2)
        self.held = [self.inner, {"again": self.inner, "me": self}]
        self.sizes, self.names, self.act = (1, [2, 3]), {"a", "b"}, torch.relu
        self.inner.register_forward_hook(self.count)
        self.plain = torch.arange(3.0)

    def count(self, module: nn.Module, args: Any, out: Tensor) -> None:
        self.seen += 1


class _Own(nn.Module):
    """A class that says how it is copied."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.copies = nn.Linear(2, 2), 0

    def __deepcopy__(self, memo: dict[int, Any]) -> _Own:
        made = _Own()
        memo[id(self)] = made
        made.inner, made.copies = copy.deepcopy(self.inner, memo), self.copies + 1
        return made


class _State(nn.Module):
    """A class with its own state."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.cache = nn.Linear(2, 2), {"big": 1}

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "cache"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.cache = {}


class _Slotted(nn.Module):
    __slots__ = ("extra",)

    def __init__(self) -> None:
        super().__init__()
        self.extra = [1, 2]


class _Hiding(nn.Module):
    """Says that it has no children."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def named_modules(self, *args: Any, **options: Any) -> Iterator[tuple[str, nn.Module]]:  # type: ignore[override]
        yield "hiding", self


class _Renamed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def named_parameters(self, *args: Any, **options: Any) -> Any:  # type: ignore[override]
        return ((f"x.{name}", p) for name, p in super().named_parameters(*args, **options))


def _shared() -> nn.Module:
    one, two = conv(3, 4), nn.Linear(4, 4)
    two.weight = nn.Parameter(torch.zeros(4, 4))
    tied = nn.Linear(4, 4)
    tied.weight = two.weight
    return nn.Sequential(one, two, one, tied, nn.ModuleList([two]), nn.ModuleDict({"k": tied}))


MODELS: dict[str, Any] = {
    "plain": lambda: nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), head(8)),
    "shared": _shared,
    "counted": _Counted,
    "own copy": lambda: nn.Sequential(_Own(), _Own()),
    "own state": lambda: nn.Sequential(_State()),
    "slots": lambda: nn.Sequential(_Slotted()),
    "hiding": lambda: nn.Sequential(nn.ReLU(), _Hiding()),
    "renamed": _Renamed,
    "parametrised": lambda: nn.Sequential(weight_norm(nn.Linear(3, 3))),
    "attention": lambda: nn.MultiheadAttention(8, 2),
    "recurrent": lambda: nn.LSTM(3, 4),
    "symbolic": lambda: torch.fx.symbolic_trace(nn.Sequential(conv(3, 8), nn.ReLU())),
}


@pytest.mark.parametrize("name", MODELS)
def test_names_are_those_of_torch(name: str) -> None:
    model = MODELS[name]()
    assert named_modules(model) == list(model.named_modules())
    parameters, buffers = named_tensors(model)
    for found, wanted in (
        (parameters, dict(model.named_parameters())),
        (buffers, dict(model.named_buffers())),
    ):
        assert list(found) == list(wanted)
        assert all(found[key] is wanted[key] for key in wanted)


def _described(value: Any, seen: dict[int, int]) -> Any:
    """All that is in a copy, with the places where the same object occurs again."""
    if isinstance(value, (type(None), bool, int, float, str, type)):
        return value
    if id(value) in seen:
        return "again", seen[id(value)]
    seen[id(value)] = len(seen)
    kind = type(value).__name__
    if isinstance(value, Tensor):
        return kind, value.tolist(), value.requires_grad
    if isinstance(value, dict):
        return kind, [(str(type(k)), _described(v, seen)) for k, v in value.items()]
    if isinstance(value, (list, tuple)):
        return kind, [_described(item, seen) for item in value]
    if isinstance(value, set):
        return kind, sorted(value)
    if isinstance(value, nn.Module):
        held = {k: v for k, v in vars(value).items() if k not in ("_graph", "_code", "training")}
        return kind, list(held), [_described(v, seen) for v in held.values()]
    owner = getattr(value, "__self__", None)
    if owner is not None and isinstance(owner, nn.Module):
        return "method", _described(owner, seen)
    return kind, value if isinstance(value, types.FunctionType) else None


@pytest.mark.parametrize("name", MODELS)
def test_copies_are_those_of_deepcopy(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    copied = deep_copy(model, {})
    assert _described(copied, {}) == _described(copy.deepcopy(model), {})
    own = {id(t) for found in named_tensors(model) for t in found.values()}
    own |= {id(module) for _, module in named_modules(model)}
    assert not any(id(module) in own for _, module in named_modules(copied))
    assert not any(id(t) in own for found in named_tensors(copied) for t in found.values())


def test_a_copy_takes_what_it_is_given() -> None:
    model = _shared()
    part = nn.Parameter(torch.ones(2, 2))
    copied = deep_copy(model, {id(model[1].weight): part})
    assert copied[1].weight is part and copied[3].weight is part
    assert copied[0] is copied[2] and copied[4][0] is copied[1]


class _Still(nn.Sequential):
    """Keeps its norms in evaluation mode."""

    def train(self, mode: bool = True) -> _Still:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


@pytest.mark.parametrize("around", [nn.Sequential, _Still])
@pytest.mark.parametrize("training", [True, False])
def test_flags_are_those_of_train(around: Any, training: bool) -> None:
    model = nn.Sequential(around(conv(3, 8), nn.BatchNorm2d(8)), nn.Dropout())
    model[1].train(not training)
    other = copy.deepcopy(model).train(training)
    set_training(model, training)
    assert [m.training for m in model.modules()] == [m.training for m in other.modules()]
    seen: list[bool] = []
    model.train = seen.append  # type: ignore[method-assign,assignment]
    set_training(model, training)
    assert seen == [training]
