"""`copy.deepcopy` of a model that does not ask every small thing in it how it is copied."""

from __future__ import annotations

import copy
import copyreg
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from psap.errors import PsapError
from psap.graph.groups import no_collection
from psap.members import named_modules

_PROTOCOL = ("__reduce__", "__reduce_ex__", "__getstate__", "__getnewargs__", "__getnewargs_ex__",
             "__deepcopy__", "__new__")  # fmt: skip
_ATOMS = (type(None), bool, int, float, str)
_DICTS = (dict, OrderedDict)
_OWN = frozenset(vars(nn.Module())) - {"_non_persistent_buffers_set"}
"""What every module has: numbers, and dictionaries of parts and hooks."""
_HOLDERS = (list, tuple, dict, OrderedDict)


def copied(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy.

    Args:
        model: the model.
        memo: replacements of objects by ``id``.

    Raises:
        PsapError: something in the model refuses to be copied.
    """
    memo = {} if memo is None else memo
    for _, module in named_modules(model):  # what a weight norm left, or what forward() keeps
        for key, value in vars(module).items():
            if isinstance(value, Tensor) or (type(value) in _HOLDERS and key not in _OWN):
                computed = [x for x in tree_leaves(value) if isinstance(x, Tensor) and x.grad_fn]
                memo.update((id(x), x.detach().clone()) for x in computed)
    try:
        # a collection would look at all that is there again and again, a mode into every tensor
        with no_collection(), torch._C._DisableTorchDispatch():
            return deep_copy(model, memo)
    except Exception as error:
        raise PsapError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); remove "
            "what copy.deepcopy refuses, such as open files or tensors that were computed"
        ) from error


def deep_copy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """What ``copy.deepcopy(model, memo)`` gives, several times as fast.

    Args:
        model: the model; modules whose classes say how they are copied are copied like that.
        memo: replacements of objects by ``id``; those of what is copied are added.
    """
    copied: nn.Module = _Copier(memo).of(model)
    return copied


class _Copier:
    def __init__(self, memo: dict[int, Any]) -> None:
        self._memo = memo
        self._plain: dict[type, bool] = {}

    def of(self, value: Any) -> Any:
        """A copy of anything."""
        kind = type(value)
        if kind in _ATOMS:
            return value
        if id(value) in self._memo:
            return self._memo[id(value)]
        if not isinstance(value, nn.Module) or not self._by_parts(value):
            return copy.deepcopy(value, self._memo)
        made: nn.Module = object.__new__(kind)
        self._memo[id(value)] = made
        state: dict[str, Any] = {}
        for key, part in value.__getstate__().items():  # without what `nn.Module.compile` made
            form = type(part)
            if form in _ATOMS:
                state[key] = part
            elif key not in _OWN or form not in _DICTS or id(part) in self._memo:
                state[key] = self.of(part)
            else:
                state[key] = self._memo[id(part)] = form()
                for name, item in part.items():
                    state[key][name] = self.of(item)
        made.__setstate__(state)
        return made

    def _by_parts(self, module: nn.Module) -> bool:
        """Whether ``copy.deepcopy`` would copy the attributes of a module and nothing else."""
        kind = type(module)
        if kind not in self._plain:
            usual = all(getattr(kind, n, None) is getattr(nn.Module, n, None) for n in _PROTOCOL)
            slots = any(vars(base).get("__slots__") for base in kind.__mro__)
            self._plain[kind] = usual and not slots and kind not in copyreg.dispatch_table
        return self._plain[kind] and "__deepcopy__" not in vars(module)
