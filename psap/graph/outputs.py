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
    """Dropouts of all kinds, also of attention, pass their input on while this is active.

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
        name = getattr(func, "__name__", "")
        if name in CHANGED or "dropout" in name:
            return self._changed(func, name, args, kwargs or {})
        return func(*args, **kwargs) if kwargs else func(*args)

    def _changed(self, func: Any, name: str, args: tuple[Any, ...], kwargs: Any) -> Any:
        if func is F.scaled_dot_product_attention:
            if len(args) < 5:
                return func(*args, **{**kwargs, "dropout_p": 0.0})
            args = (*args[:4], 0.0, *args[5:])
        if func is F.multi_head_attention_forward and len(args) > 10:
            args = (*args[:10], 0.0, *args[11:])
        if "dropout" in name:
            return args[0] if args else kwargs["input"]
        if self._steady and func is F.batch_norm and args[1] is not None and args[2] is not None:
            kwargs = {**kwargs, "training": False}
        return func(*args, **kwargs)


CHANGED = frozenset({"scaled_dot_product_attention", "multi_head_attention_forward", "batch_norm"})
"""Names of calls besides dropouts that may not run as they are."""
