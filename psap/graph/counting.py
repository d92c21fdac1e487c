"""Which modules call with sizes that may count channels: graph mode must look into those.

Everything else stays a call of the user's own module, with its smaller tensors. So control flow in
forward(), or what it does in train mode only, is no obstacle as long as it counts no channels.
"""

from __future__ import annotations

import dis
import functools
import sys
import types
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from psap.examples import bound_to, plain
from psap.graph.calls import TensorMap
from psap.graph.outputs import CHANGED, NoDropout
from psap.graph.skipping import ASKING, ValueAsked

COUNTING = frozenset({
    "view", "reshape", "unflatten", "expand", "pad", "_pad", "__getitem__", "split",
    "split_with_sizes", "chunk", "tensor_split", "narrow", "repeat", "select", "index_select",
    "multi_head_attention_forward",
})  # fmt: skip
"""Names of calls whose arguments may count channels."""


class Given(NamedTuple):
    """A tensor that a module was called with: enough to call it again.

    Attributes:
        shape, stride, dtype, device: those of the tensor.
        labels: its compact labels, or None.
    """

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    labels: Tensor | None


class Sizes:
    """What calls with sizes touched, by the name of the module in whose forward() they are.

    Attributes:
        found: their labels, by identity, which holds while they are kept.
        read: labels of tensors whose size was asked for.
        fixed: modules that call with sizes that may be those of another tensor, or that may branch
            on a size that they ask for, or scale by it.
        named: modules that call so with parameters, and which.
        given: plain arguments of the first call of each of these modules.
        entries: all arguments of each that is called once, in order, tensors as `Given`; None where
            a second call needs more than that.
        spread: tensors without channels that forward() itself expands to a size.
    """

    def __init__(self) -> None:
        self.found: dict[str, dict[int, Tensor]] = {}
        self.read: dict[str, dict[int, Tensor]] = {}
        self.fixed: set[str] = set()
        self.named: set[tuple[str, str]] = set()
        self.given: dict[str, dict[str, Any]] = {}
        self.entries: dict[str, list[Any] | None] = {}
        self._calls: dict[str, weakref.ref[Tensor] | None] = {}
        self.spread: TensorMap[bool] = TensorMap()

    def touched(self, name: str, labels: Tensor) -> None:
        """Note labels that a call with sizes touches."""
        self.found.setdefault(name, {})[id(labels)] = labels

    def called(self, tracer: Any, call: Mapping[str, Any]) -> None:
        """Note what a module was called with.

        Args:
            tracer: the `psap.graph.trace.Tracer` that follows the labels.
            call: the module as "self", "args" and "kwargs".
        """
        module, args, kwargs = call["self"], call["args"], call["kwargs"]
        name = tracer.name_of(module)
        first = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        if name in self.given:
            if tracer.counting and not _is(self._calls[name], first):
                self.entries[name] = None
            return
        self._calls[name] = None if first is None else weakref.ref(first)
        bound = bound_to(module, args, kwargs)
        self.given[name] = plain(bound)
        hooked = module._forward_pre_hooks or module._forward_hooks
        if tracer.counting and bound is not None and not hooked:
            self.entries[name] = _entry([*bound.args, *bound.kwargs.values()], tracer)


def _is(kept: weakref.ref[Tensor] | None, tensor: Tensor | None) -> bool:
    return kept is not None and kept() is tensor


def _entry(values: Any, tracer: Any) -> list[Any] | None:
    """Arguments for a second call, or None if some are more than numbers in tensors."""
    found: list[Any] = []
    for value in values:
        if value is None or type(value) in (bool, str, int, float):
            found.append(value)
        elif type(value) in (list, tuple):
            inner = _entry(value, tracer)
            if inner is None:
                return None
            found.append(type(value)(inner))
        elif type(value) is Tensor and value.is_floating_point() and value.layout is torch.strided:
            labels = tracer.get(value)
            if tracer.view(value) is not None:
                return None
            form = value.shape, value.stride(), value.dtype, value.device
            found.append(Given(*form, labels))
        else:
            return None
    return found


class Watch(NoDropout):
    """Looks for such calls while a model runs, without dropout, and tells which attention runs.

    Single calls do not say all of an attention: "implicit" is one that scales by the width of its
    heads; "known" and "fixed" also fix widths in Python, with or without a program for graph mode.

    Args:
        tracer: the `psap.graph.trace.Tracer` that follows the labels.
    """

    def __init__(self, tracer: Any) -> None:
        super().__init__(steady=True)
        self._tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the call and note the labels of its first argument and of its results."""
        name = getattr(func, "__name__", "")
        if not (name in _NOTED or "dropout" in name or name.startswith("conv")):
            return func(*args, **kwargs) if kwargs else func(*args)
        if name in ASKING and not self._tracer.computing:
            raise ValueAsked(f"{name} makes values known")
        if func is F.multi_head_attention_forward:
            self._tracer.attention = "known" if self._known() else "fixed"
        elif func is F.scaled_dot_product_attention and (kwargs or {}).get("scale") is None:
            self._tracer.attention = "implicit"
        try:
            out = super().__torch_function__(func, types, args, kwargs)
        finally:
            self._tracer.attention = ""
        if name == "size" or (name == "__get__" and func == _SHAPE):
            caller = sys._getframe(1)
            own = not caller.f_globals.get("__name__", "").startswith("torch.")
            self._asked(self._tracer.get(args[0]), own and _uses(caller.f_code))
        elif (name in COUNTING or name.startswith("conv")) and not _one_row(name, args):
            self._note(name, args[0] if args else None, out)
        return out

    def _asked(self, labels: Tensor | None, used: bool) -> None:
        call = None if labels is None else self._tracer.innermost()
        if labels is None or call is None:
            return
        sizes, where = self._tracer.sizes, self._tracer.name_of(call["self"])
        sizes.read.setdefault(where, {})[id(labels)] = labels
        if used:
            sizes.fixed.add(where)
            sizes.called(self._tracer, call)

    def _known(self) -> bool:
        """Whether graph mode has a program for a module whose heads have fixed widths."""
        call = self._tracer.innermost()
        forward = None if call is None else type(call["self"]).forward
        return forward is nn.MultiheadAttention.forward and not self._tracer.gated

    def _note(self, name: str, first: Any, out: Any) -> None:
        call = self._tracer.innermost()
        module = None if call is None else call["self"]
        if call is None or (
            name.startswith("conv") and isinstance(module, nn.modules.conv._ConvNd)
        ):
            return  # the groups of a convolution of its own follow
        sizes, where = self._tracer.sizes, self._tracer.name_of(module)
        tensors = tree_leaves((first, out))
        if name == "expand":
            sizes.spread[out] = True
        if name in ("view", "reshape", "expand"):
            sizes.fixed.add(where)
        for tensor in tensors:
            labels, view = self._tracer.get(tensor), self._tracer.view(tensor)
            if labels is not None:
                sizes.touched(where, labels)
            elif view is not None:
                sizes.named.add((where, view.name))
        sizes.called(self._tracer, call)


_SHAPE = Tensor.shape.__get__  # type: ignore[attr-defined]
_NOTED = COUNTING | CHANGED | ASKING | {"__get__", "size"}
"""Names of calls that are not only run, besides dropouts and convolutions."""


@functools.lru_cache(1024)
def _uses(code: types.CodeType) -> bool:
    """Whether a function may compare or refuse sizes (``x.shape[1] == 64``) or take their roots."""
    named = {"_assert", "sqrt"}.intersection(code.co_names)
    return bool(named) or any(
        found.opname in ("COMPARE_OP", "RAISE_VARARGS", "BINARY_POWER") or found.argrepr == "**"
        for found in dis.get_instructions(code)
    )


def _one_row(name: str, args: tuple[Any, ...]) -> bool:
    """Whether a call makes one row of all that there is, ``view(1, -1)``: right for any number."""
    if name not in ("view", "reshape"):
        return False
    given = args[1] if len(args) == 2 and isinstance(args[1], (tuple, list)) else args[1:]
    return len(given) > 0 and all(type(size) is int and size in (1, -1) for size in given)
