"""Checks of what a caller wants traced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from psap.errors import ArgumentError, ArgumentTypeError
from psap.members import named_modules, named_tensors

Inputs = tuple[Any, ...] | dict[str, Any]
"""What a model is called with: positional inputs, or inputs by keyword."""


def forward(model: Callable[..., Any], inputs: Inputs) -> Any:
    """What a model gives for inputs."""
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def wanted(inputs: Inputs) -> str:
    """What to pass instead of inputs that a model refused."""
    if isinstance(inputs, dict):
        return "pass inputs that model(**example_inputs) accepts, or (batch,) if it takes a dict"
    return "pass inputs that model(*example_inputs) accepts, or a dict of inputs by keyword"


def as_inputs(example_inputs: Any) -> Inputs:
    """Check example inputs: a tensor, a tuple or list of positional inputs, or a dict by keyword.

    Raises:
        ArgumentTypeError: it is none of them.
        ArgumentError: it is empty, or a tensor in it holds no element.
    """
    if isinstance(example_inputs, Tensor):
        example_inputs = (example_inputs,)
    if not isinstance(example_inputs, (tuple, list, Mapping)):
        raise ArgumentTypeError(
            f"example_inputs is a {type(example_inputs).__name__}; pass a tensor, a tuple of "
            "positional inputs such as (x, y), or a dict of inputs by keyword; (batch,) where the "
            "model takes a dict"
        )
    inputs: Inputs = tuple(example_inputs)
    if isinstance(example_inputs, Mapping):
        if not all(isinstance(key, str) for key in example_inputs):
            raise ArgumentTypeError(
                "example_inputs is a dict with keys that are no str; pass inputs by keyword, or "
                "(batch,) where the model takes a dict"
            )
        inputs = dict(example_inputs)
    inputs = tree_map(_plain, inputs)
    tensors = [t for t in tree_leaves(inputs) if isinstance(t, Tensor)]
    if not tensors:
        raise ArgumentError(
            "example_inputs holds no tensor; pass what the model takes, such as "
            "torch.randn(2, 3, 32, 32), not its shape"
        )
    if any(t.numel() == 0 for t in tensors):
        raise ArgumentError("example_inputs holds an empty tensor; pass a batch of at least one")
    return inputs


def _plain(value: Any) -> Any:
    """A tensor without a subclass that only adds methods: labels do not pass through those."""
    own = isinstance(value, Tensor) and type(value) not in (Tensor, nn.Parameter)
    adds = own and type(value).__torch_dispatch__ is Tensor.__torch_dispatch__
    return value.as_subclass(Tensor) if adds else value


def batched(inputs: Inputs) -> list[Tensor]:
    """The tensors among inputs whose first dimension is that of the batch."""
    return [x for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.dim()]


def doubled(inputs: Inputs) -> Inputs | None:
    """Inputs that are a batch of one as a batch of two, else None."""
    if any(x.shape[0] != 1 for x in batched(inputs)):
        return None
    twice: Inputs = tree_map(
        lambda x: x.repeat(2, *[1] * (x.dim() - 1)) if isinstance(x, Tensor) and x.dim() else x,
        inputs,
    )
    return twice


def check_model(model: Any) -> nn.Module:
    """Check that a model is one that can be traced.

    Looks through ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel``.

    Raises:
        ArgumentTypeError: it is no ``nn.Module``, or it, or a part of it, is scripted or sharded.
        ArgumentError: it has no parameters, lazy ones, ones on several devices, a sparse tensor, or
            two parameters on the same memory.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"model is a {type(model).__name__}; pass a torch.nn.Module")
    inner = getattr(model, "_orig_mod", None)  # of what torch.compile wrapped
    checked: nn.Module = inner if isinstance(inner, nn.Module) else model
    if isinstance(checked, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        checked = checked.module
    held = named_modules(checked)
    for name, module in held:
        if isinstance(module, torch.jit.ScriptModule):
            raise ArgumentTypeError(
                f"{name or 'model'} is a ScriptModule (of torch.jit.script or torch.jit.trace), "
                f"which cannot be made smaller; {'put' if name else 'pass'} the eager nn.Module "
                f"{'in its place that it' if name else 'that it'} was made from, and script the "
                "small network"
            )
    parameters, buffers = named_tensors(checked, held)
    if not parameters:
        raise ArgumentError("model has no parameters; there is nothing to prune")
    lazy = [n for n, p in parameters.items() if isinstance(p, nn.parameter.UninitializedParameter)]
    if lazy:
        raise ArgumentError(f"{lazy[0]} is not initialised; run the model once, then call psap")
    sparse = [n for n, t in (*parameters.items(), *buffers.items()) if t.layout != torch.strided]
    if sparse:
        raise ArgumentError(
            f"{sparse[0]} is no dense tensor, and psap cannot follow channels through it; "
            "make it one with .to_dense()"
        )
    sharded = [n for n, p in parameters.items() if type(p).__name__ in ("DTensor", "FlatParameter")]
    if sharded:
        raise ArgumentTypeError(
            f"{sharded[0]} is spread over several processes (FSDP or a DTensor), so that none "
            "has whole channels; train with DistributedDataParallel, or gather the model first"
        )
    devices = sorted(map(str, {p.device for p in parameters.values()}))
    if len(devices) > 1:
        raise ArgumentError(f"model lies on several devices ({', '.join(devices)}); move it to one")
    if devices == ["meta"]:
        raise ArgumentError("model lies on the meta device; give it memory with model.to_empty")
    if (found := _overlapping(parameters)) is not None:
        raise ArgumentError(
            f"{found[0]} and {found[1]} are two parameters on the same memory, and would be no "
            "longer when they shrink; use one nn.Parameter in both places, or copy with .clone()"
        )
    return checked


def _overlapping(parameters: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """The names of two parameters that share memory, though they are not the same one."""
    spans = []
    for name, p in {id(p): (name, p) for name, p in parameters.items() if p.numel()}.values():
        reach = sum((size - 1) * step for size, step in zip(p.shape, p.stride(), strict=True)) + 1
        spans.append((p.data_ptr(), p.data_ptr() + reach * p.element_size(), name))
    spans.sort()
    for (_, end, name), (start, _, other) in pairwise(spans):
        if start < end:
            return name, other
    return None
