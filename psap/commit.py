"""Move small networks into the caller's objects: all of it, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

SIZES = (
    "in_channels", "out_channels", "groups", "num_features", "in_features", "out_features",
    "num_parameters", "embedding_dim", "num_groups", "num_channels", "normalized_shape",
)  # fmt: skip
"""Attributes of PyTorch's modules that follow the shapes of their tensors."""
TABLES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
"""What a module keeps when it becomes a program."""
Undo = list[Callable[[], None]]


def commit(
    networks: Sequence[tuple[nn.Module, nn.Module]],
    states: Sequence[tuple[torch.optim.Optimizer, Mapping[str, Any]]],
    names: Mapping[int, str],
) -> None:
    """Give networks the tensors of their small copies, and optimizers new state.

    Whatever fails or interrupts it, everything is put back.

    Args:
        networks: the caller's network, and a small copy of it in which some modules may be
            programs.
        states: an optimizer, and its new state by the name of the parameter.
        names: names of the parameters that optimizers train, by ``id``.
    """
    with _undoing() as undo:
        for model, small in networks:
            _move_network(model, small, undo)
        for optimizer, state in states:
            _move_state(optimizer, state, names, undo)


def _move_network(model: nn.Module, small: nn.Module, undo: Undo) -> None:
    news = {**dict(small.named_parameters()), **dict(small.named_buffers())}
    for name, old in (*model.named_parameters(), *model.named_buffers()):
        undo.append(_restorer(old, old.data, old.grad))
        _set(old, news[name].data, news[name].grad)
    modules = dict(model.named_modules())
    for name, source in small.named_modules():
        module = modules.get(name)
        if module is None:
            continue  # a program has brought it along
        if isinstance(source, fx.GraphModule):
            _become(module, source, undo)
        for key in SIZES:
            _move(module, source, key, undo)


def _become(module: nn.Module, source: fx.GraphModule, undo: Undo) -> None:
    """Let a module run a program; it stays the same object, with its own tensors and children."""
    kind, own = type(module), dict(vars(module))
    tables = {key: own[key].copy() for key in TABLES}

    def restore() -> None:
        module.__class__ = kind
        vars(module).clear()
        vars(module).update(own)
        for key, table in tables.items():
            own[key].clear()
            own[key].update(table)

    undo.append(restore)
    for key in TABLES:  # what the program has brought along
        known, found = own[key], vars(source)[key]
        if isinstance(known, dict):
            known.update({name: value for name, value in found.items() if name not in known})
        else:
            known |= found
    kept = {k for k in own if k in TABLES or k == "training" or "_hooks" in k}
    vars(module).update({k: value for k, value in vars(source).items() if k not in kept})
    module.__class__ = type(source)
    module.graph.owning_module = module  # type: ignore[union-attr]


def _move_state(
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    names: Mapping[int, str],
    undo: Undo,
) -> None:
    before = dict(optimizer.state)
    undo.append(lambda: optimizer.state.update(before))
    for parameter in before:
        optimizer.state[parameter] = state[names[id(parameter)]]


def _move(module: nn.Module, source: nn.Module, key: str, undo: Undo) -> None:
    old = module.__dict__.get(key)
    new = source.__dict__.get(key, old)  # a program has none
    if isinstance(old, (int, tuple)) and old != new:
        undo.append(lambda: setattr(module, key, old))
        setattr(module, key, new)


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
def _undoing() -> Iterator[Undo]:
    """Run what was collected, last first, if the block fails or is interrupted."""
    undo: Undo = []
    try:
        yield undo
    except BaseException:
        for action in reversed(undo):
            action()
        raise
