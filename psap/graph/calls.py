"""Small things that tracing does for every call, made cheap: a map of tensors, and schemas."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Value = TypeVar("Value")


class TensorMap(Generic[Value]):
    """A mapping by identity that keeps no tensor alive.

    The entry of a dead tensor stays until the map goes, but is never found: its id may belong to
    another tensor by then, which its weak reference is not one of.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[Tensor], Value]] = {}

    def get(self, tensor: Tensor) -> Value | None:
        """The value of a tensor, or None."""
        entry = self._entries.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def all(self, tensors: Iterable[Tensor]) -> list[Value]:
        """The values of those tensors that have one."""
        found = []
        for tensor in tensors:
            entry = self._entries.get(id(tensor))
            if entry is not None and entry[0]() is tensor:
                found.append(entry[1])
        return found

    def __contains__(self, tensor: Tensor) -> bool:
        entry = self._entries.get(id(tensor))
        return entry is not None and entry[0]() is tensor

    def __setitem__(self, tensor: Tensor, value: Value) -> None:
        self._entries[id(tensor)] = (weakref.ref(tensor), value)


class QuietMode(TorchDispatchMode):
    """A dispatch mode that does not bring in torch.compile."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Whether to wrap the dispatcher for torch.compile, which would import all of it."""
        return False


TURNING = ("squeeze_", "unsqueeze_", "transpose_", "t_")
"""Calls that move the dimensions of a tensor in place."""


class Schema(NamedTuple):
    """What tracing wants to know of an ATen overload.

    Attributes:
        packet: all overloads of the op.
        name: its name, such as ``aten.add``.
        names: of all arguments, in order.
        defaults: their defaults by name.
        mutable: whether it writes to an argument.
        turning: whether it gives its first argument another shape, in place.
        shapes_only: whether it looks at the shape of its inputs only.
    """

    packet: Any
    name: str
    names: tuple[str, ...]
    defaults: Mapping[str, Any]
    mutable: bool
    turning: bool
    shapes_only: bool


@functools.cache
def schema(func: Any) -> Schema:
    """The schema of an overload."""
    packet = func.overloadpacket
    short: str = packet.__name__
    return Schema(
        packet=packet,
        name=str(packet),
        names=tuple(x.name for x in func._schema.arguments),
        defaults={
            x.name: x.default_value if x.has_default_value() else None
            for x in func._schema.arguments
        },
        mutable=bool(func._schema.is_mutable),
        turning=short in TURNING,
        shapes_only=short.startswith(("new_", "sym_")) or short.endswith("_like"),
    )


def bind(found: Schema, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by their names in the schema."""
    bound = dict(found.defaults)
    bound.update(zip(found.names, args, strict=False))
    bound.update(kwargs)
    return bound


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among the arguments of a call, and in its lists."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(value)
    return found


PICKING = ("index", "index_select", "gather", "take", "embedding")
"""Calls that take entries of a table by their numbers."""


def why_whole(name: str, found: Schema) -> str:
    """Why a parameter keeps its shape that a call reads, but no rule of it."""
    told = f"{name} keeps its shape: forward() "
    if found.name.removeprefix("aten.") in PICKING:
        return f"{told}looks entries up in it by number ({found.name}), so all stay"
    return (
        f"{told}computes with it by {found.name}, and psap does not know which of its channels "
        "then belong together"
    )


def why_lost(found: Schema, *, known: bool) -> str:
    """Why channels stay that go into a call: it has no rule, or its rule gave none out."""
    if known:
        return f"lost in {found.name}, behind which psap cannot tell the channels apart"
    return f"no rule for {found.name}, which may mix channels"
