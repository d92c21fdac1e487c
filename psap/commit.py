"""Move small networks into the caller's objects: all of it, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

SIZES = (
    "in_channels", "out_channels", "groups", "num_features", "in_features", "out_features",
    "num_parameters", "embedding_dim", "num_groups", "num_channels",
)  # fmt: skip
"""Attributes of PyTorch's modules that follow the shapes of their tensors."""


def commit(
    networks: Sequence[tuple[nn.Module, nn.Module]],
    states: Sequence[tuple[torch.optim.Optimizer, Mapping[str, Any]]],
    names: Mapping[int, str],
) -> None:
    """Give networks the tensors of their small copies, and optimizers new state.

    Whatever fails or interrupts it, everything is put back.

    Args:
        networks: the caller's network, and a small copy of it with the same modules.
        states: an optimizer, and its new state by the name of the parameter.
        names: names of the parameters that optimizers train, by ``id``.
    """
    with _undoing() as undo:
        for model, small in networks:
            _move_network(model, small, undo)
        for optimizer, state in states:
            _move_state(optimizer, state, names, undo)


def _move_network(model: nn.Module, small: nn.Module, undo: list[Callable[[], None]]) -> None:
    tensors = [(*net.parameters(), *net.buffers()) for net in (model, small)]
    for old, new in zip(*tensors, strict=True):
        undo.append(_restorer(old, old.data, old.grad))
        _set(old, new.data, new.grad)
    for module, source in zip(model.modules(), small.modules(), strict=True):
        for key in SIZES:
            _move(module, source, key, undo)


def _move_state(
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    names: Mapping[int, str],
    undo: list[Callable[[], None]],
) -> None:
    before = dict(optimizer.state)
    undo.append(lambda: optimizer.state.update(before))
    for parameter in before:
        optimizer.state[parameter] = state[names[id(parameter)]]


def _move(module: nn.Module, source: nn.Module, key: str, undo: list[Callable[[], None]]) -> None:
    old = module.__dict__.get(key)
    if isinstance(old, int) and old != source.__dict__[key]:
        undo.append(lambda: setattr(module, key, old))
        setattr(module, key, source.__dict__[key])


def _restorer(tensor: Tensor, data: Tensor, grad: Tensor | None) -> Callable[[], None]:
    return lambda: _set(tensor, data, grad)


def _set(tensor: Tensor, data: Tensor, grad: Tensor | None) -> None:
    """Give a tensor other data of another shape.

    Autograd remembers the shape of a parameter as long as any old loss is alive; it forgets it only
    when the dtype changes.
    """
    tensor.grad = None
    if tensor.requires_grad and tensor.shape != data.shape:
        other = torch.float64 if data.dtype == torch.float32 else torch.float32
        tensor.data = data.new_empty(0, dtype=other)
    tensor.data = data
    tensor.grad = grad


@contextmanager
def _undoing() -> Iterator[list[Callable[[], None]]]:
    """Run what was collected, last first, if the block fails or is interrupted."""
    undo: list[Callable[[], None]] = []
    try:
        yield undo
    except BaseException:
        for action in reversed(undo):
            action()
        raise
