"""The modules and tensors of a model by name, in one quick walk.

PyTorch's own iterators go through a generator for every level of the model. Names are asked for in
every part of psap, so for networks of many small layers that took longer than all the rest.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

_ASKED = ("named_parameters", "named_buffers", "_named_members")


def named_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """What ``model.named_modules()`` gives: every module once, under its first name."""
    found: list[tuple[str, nn.Module]] = []
    return found if _walk(model, "", found, set()) else list(model.named_modules())


def _walk(module: nn.Module, name: str, found: list[tuple[str, nn.Module]], seen: set[int]) -> bool:
    """Collect modules; False if one of them says in its own way what its modules are."""
    seen.add(id(module))
    found.append((name, module))
    start = f"{name}." if name else ""
    for key, child in module._modules.items():
        new = child is not None and id(child) not in seen
        if new and not _walk(child, start + key, found, seen):  # type: ignore[arg-type]
            return False
    return type(module).named_modules is nn.Module.named_modules


def named_tensors(
    model: nn.Module, held: list[tuple[str, nn.Module]] | None = None
) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
    """What ``named_parameters()`` and ``named_buffers()`` give: each once, under its first name.

    Args:
        model: the model.
        held: its `named_modules`, where they are known.
    """
    if any(getattr(type(model), name) is not getattr(nn.Module, name) for name in _ASKED):
        return dict(model.named_parameters()), dict(model.named_buffers())
    held = named_modules(model) if held is None else held
    return _named(held, "_parameters"), _named(held, "_buffers")


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters, then the buffers, by name."""
    parameters, buffers = named_tensors(model)
    return {**parameters, **buffers}


def _named(held: list[tuple[str, nn.Module]], kind: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    seen: set[int] = set()
    for name, module in held:
        start = f"{name}." if name else ""
        for key, tensor in getattr(module, kind).items():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                found[start + key] = tensor
    return found


def set_training(model: nn.Module, training: bool) -> None:
    """``model.train(training)``."""
    held = [module for _, module in named_modules(model)]
    plain = all(type(m).train is nn.Module.train and "train" not in vars(m) for m in held)
    if not plain:
        model.train(training)
        return
    for module in held:
        put_training(module, training)


def put_training(module: nn.Module, training: bool) -> None:
    """Set the flag of one module, without asking ``nn.Module.__setattr__`` what it is."""
    state = vars(module)
    if "training" in state:
        state["training"] = training
    else:
        module.training = training
