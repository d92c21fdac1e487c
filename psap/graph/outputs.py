"""What comes out of a model, and running it without the randomness of dropout."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves


def output_tensors(value: Any) -> list[Tensor]:
    """Every tensor in what a model returned: nested sequences, mappings, and objects."""
    return _tensors(value, set())


def _tensors(value: Any, seen: set[int]) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if id(value) in seen or isinstance(value, (type, nn.Module)):
        return []
    if dataclasses.is_dataclass(value):
        seen.add(id(value))
        value = [getattr(value, item.name) for item in dataclasses.fields(value)]
    elif isinstance(value, Mapping):
        value = list(value.values())
    elif not isinstance(value, (list, tuple, set)) and hasattr(value, "__dict__"):
        seen.add(id(value))
        value = [*tree_leaves(value), *vars(value).values()]
    if isinstance(value, (list, tuple, set)):
        return [tensor for item in value for tensor in _tensors(item, seen)]
    return [t for t in tree_leaves(value) if isinstance(t, Tensor)]


class NoDropout(TorchFunctionMode):
    """Dropouts of all kinds pass their input on while this is active.

    Args:
        steady: nor do batch norms that have running statistics take those of the batch. Where
            values do not matter, that is quicker, and works with one value per channel.
    """

    def __init__(self, *, steady: bool = False) -> None:
        super().__init__()
        self._steady = steady

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Skip the call if it is a dropout."""
        kwargs = kwargs or {}
        if "dropout" in getattr(func, "__name__", ""):
            return args[0] if args else kwargs["input"]
        if self._steady and func is F.batch_norm and args[1] is not None and args[2] is not None:
            kwargs = {**kwargs, "training": False}
        return func(*args, **kwargs)
