"""What modules are called with and give for the example: torch.fx asks where forward() branches."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from psap.errors import VerificationError
from psap.symbolic import traced
from psap.untouched import untouched


def example_of(name: str, given: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The arguments of a module, and the results of its descendants."""
    start = f"{name}." if name else ""
    results = {
        f"{n.removeprefix(start)}()": values["()"]
        for n, values in given.items()
        if n.startswith(start) and n != name and "()" in values
    }
    return {k: v for k, v in given.get(name, {}).items() if k != "()"} | results


def program_of(module: nn.Module, args: Any, kwargs: Any) -> None:
    """Check that torch.fx can trace a module that is called like this.

    Raises:
        VerificationError: it cannot.
    """
    try:
        traced(module, plain(bound_to(module, args, kwargs)))
    except VerificationError:  # without what forward() may ask of sizes
        with untouched(module), examples(module) as given:
            module(*args, **kwargs)
        traced(module, example_of("", given))


def bound_to(module: nn.Module, args: Any, kwargs: Any) -> inspect.BoundArguments | None:
    """The arguments of a call by name, if forward() says what they are."""
    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
    except (TypeError, ValueError):  # of TorchScript, or a wrapper that adds arguments
        return None
    bound.apply_defaults()
    return bound


def plain(bound: inspect.BoundArguments | None) -> dict[str, Any]:
    """Those arguments that are None, switches or names."""
    given = {} if bound is None else bound.arguments
    return {k: v for k, v in given.items() if v is None or type(v) in (bool, str)}


@contextmanager
def examples(model: nn.Module) -> Iterator[dict[str, dict[str, Any]]]:
    """Arguments of the first call of every module: plain values, tensors (as meta), and lists."""
    given: dict[str, dict[str, Any]] = {}
    with ExitStack() as hooks:
        for name, module in model.named_modules():

            def note(m: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                bound = bound_to(m, args, kwargs)
                if bound is not None and name not in given:
                    known = {k: v for k, v in bound.arguments.items() if _is_example(v)}
                    given[name] = tree_map_only(Tensor, _on_meta, known)

            def note_result(_: nn.Module, __: Any, out: Any, name: str = name) -> None:
                if _is_example(out) and name in given:
                    given[name].setdefault("()", tree_map_only(Tensor, _on_meta, out))

            hooks.enter_context(module.register_forward_pre_hook(note, with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(note_result))
        yield given


def _is_example(value: Any) -> bool:
    plain_types = (bool, str, int, float, Tensor, type(None))
    return all(isinstance(x, plain_types) for x in tree_leaves(value))


def _on_meta(x: Tensor) -> Tensor:
    """A tensor of the same shape and dtype without memory, made where no mode looks."""
    with torch._C.DisableTorchFunction():
        return torch.empty(tuple(x.shape), dtype=x.dtype, device="meta")
