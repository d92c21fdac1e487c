"""Autograd functions of the user's own, as calls in a program.

torch.fx goes through their forward() and records what it computes, and their backward() is lost:
rounding whose gradient is passed straight through would have none.
"""

from __future__ import annotations

import operator
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.autograd import Function
from torch.utils._pytree import tree_leaves


def applied(module: str, name: str, *given: Any) -> Any:
    """What an autograd function gives, with the gradients that it says.

    Args:
        module: name of the module that defines it.
        name: its qualified name there.
        given: its arguments.
    """
    return operator.attrgetter(name)(sys.modules[module]).apply(*given)


@contextmanager
def whole(tracer: fx.Tracer) -> Iterator[None]:
    """Record calls of autograd functions, instead of what they compute.

    Those of PyTorch and those that are given functions (checkpoints) are gone through: their
    gradients are those of what they compute.

    Args:
        tracer: what traces.

    Raises:
        TypeError: a program cannot name the class of one.
    """
    own, thread = vars(Function)["apply"], threading.get_ident()

    def apply(kind: type[Function], *given: Any, **options: Any) -> Any:
        leaves = tree_leaves((given, options))
        traced = any(isinstance(leaf, fx.Proxy) for leaf in leaves)
        runs = any(callable(leaf) and not isinstance(leaf, fx.Proxy) for leaf in leaves)
        torchs = kind.__module__.partition(".")[0] == torch.__name__
        if threading.get_ident() != thread or torchs or runs or not traced or options:
            return own.__get__(None, kind)(*given, **options)
        place = kind.__module__, kind.__qualname__
        if not _names(*place, kind):
            raise TypeError(
                f"the gradients of {kind.__qualname__} would be lost, since it is defined inside "
                "of a function; define it in a module"
            )
        return tracer.create_proxy("call_function", applied, (*place, *given), {})

    setattr(Function, "apply", classmethod(apply))  # noqa: B010 - mypy knows it as a method
    try:
        yield
    finally:
        setattr(Function, "apply", own)  # noqa: B010


def _names(module: str, name: str, kind: type[Function]) -> bool:
    try:
        return operator.attrgetter(name)(sys.modules[module]) is kind
    except (AttributeError, KeyError):
        return False
