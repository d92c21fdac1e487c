"""Example inputs as data: shapes and dtypes in the place of tensors, in files and out of them."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from psap.errors import FileError
from psap.graph.inputs import Inputs

MOST_ELEMENTS = 1 << 26
"""A file may not ask for larger example inputs (a guard against bombs)."""
MAX_DEPTH = 20
"""How deep example inputs in a file may be nested."""


@dataclass(frozen=True)
class InputSpec:
    """Shape and dtype of an example input, enough to make one up."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class InputValue:
    """An example input that is no tensor, but a number, a text, a switch, or None."""

    value: bool | float | str | None


def specs(inputs: Any) -> Any:
    """Inputs with a spec in the place of every tensor, and None in that of what no file holds."""
    if isinstance(inputs, Tensor):
        return InputSpec(tuple(inputs.shape), str(inputs.dtype).removeprefix("torch."))
    if type(inputs) in (tuple, list):
        return type(inputs)(specs(value) for value in inputs)
    if type(inputs) in (dict, OrderedDict) and all(type(key) is str for key in inputs):
        return {key: specs(value) for key, value in inputs.items()}
    known = inputs is None or type(inputs) in (bool, int, float, str)
    return InputValue(inputs) if known else None


def zeros(found: Any, device: torch.device | str = "cpu") -> Inputs | None:
    """Inputs with zeros in the place of specs; None if a spec does not say what was there."""

    def made(x: InputSpec | InputValue) -> Any:
        if isinstance(x, InputValue):
            return x.value
        return torch.zeros(x.shape, dtype=getattr(torch, x.dtype), device=device)

    if not found or any(x is None for x in tree_leaves(found)):
        return None
    inputs: Inputs = tree_map(made, found)
    return inputs


def to_json(found: Any) -> Any:
    """Specs as JSON values: a list for positional inputs, else an object that says what it is."""
    return [_written(x) for x in found] if type(found) is tuple else _written(found)


def _written(found: Any) -> Any:
    if isinstance(found, dict):
        return {"dict": {key: _written(value) for key, value in found.items()}}
    if isinstance(found, (list, tuple)):
        return {type(found).__name__: [_written(value) for value in found]}
    return None if found is None else vars(found)


def from_json(body: Any) -> Any:
    """Read specs with suspicion.

    Raises:
        FileError: they are none, or ask for inputs that are no real ones.
        LookupError, TypeError, ValueError: likewise.
    """
    if isinstance(body, list):
        return tuple(_read(value, 0) for value in body)
    if not isinstance(body["dict"], dict):
        raise ValueError("inputs are neither a list nor a dict")
    return _read(body, 0)


def _read(body: Any, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise ValueError("inputs are nested too deeply")
    if body is None:
        return None
    if "dict" in body:
        return {str(key): _read(value, depth + 1) for key, value in body["dict"].items()}
    if "list" in body or "tuple" in body:
        kind, found = (list, body["list"]) if "list" in body else (tuple, body["tuple"])
        return kind(_read(value, depth + 1) for value in found)
    return _value(body["value"]) if "value" in body else _tensor(body)


def _value(value: Any) -> InputValue:
    if value is not None and type(value) not in (bool, int, float, str):
        raise ValueError("an input is no number, text or switch")
    return InputValue(value)


def _tensor(body: Mapping[str, Any]) -> InputSpec:
    """An input that `psap.apply` will make up: a real dtype, and no bomb of a shape."""
    shape, dtype = tuple(body["shape"]), body["dtype"]
    real = isinstance(dtype, str) and isinstance(getattr(torch, dtype, None), torch.dtype)
    whole = all(type(size) is int and size >= 1 for size in shape)
    if not real or not whole or math.prod(shape) > MOST_ELEMENTS:
        raise FileError("the plan is damaged at 'inputs'; make it again with psap.plan")
    return InputSpec(shape, dtype)
