"""Which modules of a model are built alike, so that one program is that of all of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from psap.members import named_modules

_VALUES = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


def twins(model: nn.Module, given: Mapping[str, Any]) -> list[list[str]]:
    """Modules that differ in nothing but the numbers in their parameters and buffers.

    Args:
        model: the model.
        given: names of some of its modules, and what each one is called with.

    Returns:
        The names; those of modules that are built alike, and called alike, together.
    """
    held = dict(named_modules(model))
    kinds: dict[type[nn.Module], list[str]] = {}
    for name in given:
        kinds.setdefault(type(held[name]), []).append(name)
    found: dict[Any, list[str]] = {}
    for kind, names in kinds.items():
        for name in names:
            key: Any = kind
            if len(names) > 1:
                seen: dict[int, int] = {}
                key = _build(held[name], seen), _build(given[name], seen)
            found.setdefault(key, []).append(name)
    return list(found.values())


def _build(value: Any, seen: dict[int, int]) -> Hashable:
    """What a value is made of, such that equal ones behave alike; else which object it is."""
    if isinstance(value, _VALUES):
        return type(value), value
    if type(value) in (tuple, list, torch.Size):
        return type(value), *(_build(item, seen) for item in value)
    if type(value) in (dict, OrderedDict):
        return type(value), *((key, _build(item, seen)) for key, item in value.items())
    if type(value) is set:
        return set, frozenset(_build(item, seen) for item in value)
    if id(value) in seen:
        return "again", seen[id(value)]
    if isinstance(value, nn.Module):
        seen[id(value)] = len(seen)
        tensors = [*value._parameters.values(), *value._buffers.values()]
        forms = tuple(_form(tensor, seen) for tensor in tensors)
        return type(value), forms, _build(vars(value), seen)
    if isinstance(value, Tensor) and value.is_meta:
        return _form(value, {})
    return "object", id(value)


def _form(tensor: Tensor | None, seen: dict[int, int]) -> Hashable:
    """All of a tensor but its numbers."""
    if tensor is None:
        return None
    number = seen.setdefault(id(tensor), len(seen))
    return type(tensor), tensor.shape, tensor.stride(), tensor.dtype, tensor.device, number
