"""Running a model without leaving a trace in it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

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
    """Put back train flags, buffers and the random state when the block ends.

    In the block the model runs as it is written, also where ``nn.Module.compile`` was called.
    """
    flags = [(module, module.training) for _, module in named_modules(model)]
    compiled = {m: vars(m).pop(COMPILED) for m, _ in flags if vars(m).get(COMPILED) is not None}
    parts = [t for m, _ in flags for t in (*m._parameters.values(), *m._buffers.values())]
    held = {id(t): t for m, _ in flags for t in m._buffers.values() if t is not None}
    saved = _joined(held.values())
    devices = sorted({t.device.index for t in parts if t is not None and t.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        try:
            yield
        finally:
            for module, training in flags:
                if module.training is not training:
                    put_training(module, training)
            for module, call in compiled.items():
                vars(module)[COMPILED] = call
            _put_back(held.values(), saved)


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
