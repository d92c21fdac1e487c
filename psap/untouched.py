"""Running a model without leaving a trace in it."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from psap.members import named_modules, put_training

Given = ParamSpec("Given")
Made = TypeVar("Made")
Kind = tuple[torch.dtype, torch.device]
COMPILED = "_compiled_call_impl"
"""The attribute of a module in which ``nn.Module.compile`` keeps what it made."""


def trainable(call: Callable[Given, Made]) -> Callable[Given, Made]:
    """Let a function make tensors that can be trained, also in `torch.inference_mode`."""

    @functools.wraps(call)
    def outside(*args: Given.args, **options: Given.kwargs) -> Made:
        if not torch.is_inference_mode_enabled():
            return call(*args, **options)
        with torch.inference_mode(False), torch.no_grad():  # the first alone turns gradients on
            return call(*args, **options)

    return outside


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put everything back as `unchanged` does when the block ends.

    In the block the model runs as it is written, also where ``nn.Module.compile`` was called.
    """
    compiled = {
        module: vars(module).pop(COMPILED)
        for _, module in named_modules(model)
        if vars(module).get(COMPILED) is not None
    }
    try:
        with unchanged(model):
            yield
    finally:
        for module, call in compiled.items():
            vars(module)[COMPILED] = call


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Put back train flags, buffers, attributes and the random state when the block ends."""
    modules = [module for _, module in named_modules(model)]
    flags = [module.training for module in modules]
    parts = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values())]
    devices = sorted({t.device.index for t in parts if t is not None and t.device.type == "cuda"})
    own = [module for module in modules if _may_bind(module)]
    attributes = [_Attributes(module) for module in own]
    held = {id(t): t for m in modules for t in m._buffers.values() if t is not None}
    held |= {id(t): t for m in own for t in vars(m).values() if _is_plain(t)}
    saved = _joined(held.values())
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        try:
            yield
        finally:
            for module, training in zip(modules, flags, strict=True):
                if module.training is not training:
                    put_training(module, training)
            for each in attributes:
                each.put_back()
            _put_back(held.values(), saved)


class _Attributes:
    """The buffers and own attributes of a module, which forward() may bind anew or add to."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._built = _parts(module)
        values = vars(module)
        lists = [v for k, v in values.items() if type(v) in _CONTAINERS and k not in _PARTS]
        self._before = [(held, copy(held)) for held in (values, *lists)]

    def put_back(self) -> None:
        """Bind what was bound before; what a first call built out of modules stays."""
        if _parts(self._module) != self._built:
            return
        for held, before in self._before:
            if _members(held) != _members(before):
                _refill(held, before)


_CONTAINERS = (list, dict, set, deque)
_PARTS = ("_parameters", "_modules")


def _may_bind(module: nn.Module) -> bool:
    """Whether a call may bind attributes: those of PyTorch do not, unless by a hook."""
    hooked = module._forward_hooks or module._forward_pre_hooks
    return bool(hooked) or not type(module).__module__.startswith("torch.nn.")


def _is_plain(value: Any) -> bool:
    """Whether an attribute is a tensor whose values can be copied and put back."""
    return type(value) is Tensor and value.layout is torch.strided and not value.is_nested


def _parts(module: nn.Module) -> list[int]:
    return [id(part) for part in (*module._parameters.values(), *module._modules.values())]


def _members(held: Any) -> list[Any]:
    """Which objects a container holds, under which keys."""
    if isinstance(held, dict):
        return [*held, *map(id, held.values())]
    return [*map(id, held)]


def _refill(held: Any, before: Any) -> None:
    """Give a container its members back; an interrupt in the middle leaves none of them out."""
    if isinstance(held, dict):
        held.update(before)
        for key in [key for key in held if key not in before]:
            del held[key]
    elif isinstance(held, set):
        held.update(before)
        held.intersection_update(before)
    elif isinstance(held, list):
        held[:] = before
    else:
        held.extend(before)
        for _ in range(len(held) - len(before)):
            held.popleft()


def _joined(buffers: Iterable[Tensor]) -> dict[Kind, Tensor]:
    """Copies of many small tensors, one after the other; few calls, since norms have many."""
    alike: dict[Kind, list[Tensor]] = {}
    for buffer in buffers:
        alike.setdefault((buffer.dtype, buffer.device), []).append(buffer.detach().reshape(-1))
    return {kind: torch.cat(found) for kind, found in alike.items()}


def _put_back(buffers: Iterable[Tensor], saved: Mapping[Kind, Tensor]) -> None:
    """Undo changes of buffers; norms change theirs without a new version number."""
    now = _joined(buffers)
    for kind, before in saved.items():
        if torch.equal(now[kind], before):
            continue
        alike = [b for b in buffers if (b.dtype, b.device) == kind]
        for buffer, part in zip(alike, before.split([b.numel() for b in alike]), strict=True):
            if not torch.equal(buffer.reshape(-1), part):
                buffer.copy_(part.view(buffer.shape))
