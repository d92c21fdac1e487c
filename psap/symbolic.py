"""A module's forward() as a torch.fx program that serves evaluation and training."""

from __future__ import annotations

import copy
import dis
import functools
import operator
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_unflatten

from psap.contexts import noted
from psap.custom import whole
from psap.errors import ArgumentError, VerificationError
from psap.multihead import Traceable
from psap.shared import SharedTracer, Uncompiled
from psap.untouched import untouched


def traced(model: nn.Module, given: Mapping[str, Any], *, whole: bool = False) -> fx.GraphModule:
    """The module as a program that serves both modes; its children stay calls of modules.

    Args:
        model: the module.
        given: arguments of a call: what is None, a switch or a name becomes a constant; of tensors
            on the meta device and of numbers, forward() may ask sizes where it branches. Results of
            its children under their names and "()".
        whole: functions that ``torch.fx.wrap`` names may stay single calls.

    Raises:
        VerificationError: torch.fx cannot trace it, or it does different things in the two modes.
    """
    try:
        trained, dense = _both(model, given, through=not whole)
    except Exception as error:
        raise VerificationError(
            f"torch.fx cannot trace {type(model).__name__}: {type(error).__name__}: {error}"
        ) from error
    same = len(dense.graph.nodes) == len(trained.graph.nodes)
    twins: dict[fx.Node, fx.Node] = {}
    for node, other in zip(list(dense.graph.nodes), trained.graph.nodes, strict=False):
        twins[other] = node
        then = fx.map_arg((other.args, other.kwargs), lambda n: twins.get(n, n))
        same = same and (node.op, node.target) == (other.op, other.target)
        if same and then != (node.args, node.kwargs):
            same = _as_module(dense, node, *then) or _by_mode(dense, node, then)
    held = [dict(program.named_buffers(recurse=False)) for program in (dense, trained)]
    same = same and all(
        name in held[1] and torch.equal(value, held[1][name])
        for name, value in held[0].items()
        if name.startswith("_tensor_constant")
    )
    if not same:
        raise VerificationError(
            f"forward() of {type(model).__name__} does different things in train and in eval mode"
        )
    return dense


def _both(
    model: nn.Module, given: Mapping[str, Any], *, through: bool
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The programs of train and of evaluation mode."""
    programs = []
    with untouched(model):
        for training in (True, False):
            model.train(training)
            programs.append(_symbolic(model, given, through))
    return programs[0], programs[1]


class _Proxy(fx.Proxy):
    """A value whose positions forward() may set, and whose items it may count."""

    def __iter__(self) -> Iterator[Any]:
        """As torch.fx does it, which decodes the whole calling function every time."""
        frame: Any = sys._getframe(1)
        count = _unpacked(frame.f_code, frame.f_lasti)
        return self.tracer.iter(self) if count is None else (self[i] for i in range(count))  # type: ignore[index]

    def __len__(self) -> int:
        return sum(1 for _ in iter(self))

    def __int__(self) -> int:
        value = self.tracer.number(self)  # type: ignore[attr-defined]
        return int(value)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __getattr__(self, name: str) -> Any:
        return _Attribute(self, name)


class _Attribute(fx.proxy.Attribute, _Proxy):
    """An attribute, such as a shape, whose items forward() may count."""


@functools.cache
def _known_to_einops() -> type:
    """Let einops take the values of a trace for tensors: the class that it finds while it lives."""
    backends = sys.modules["einops._backends"]

    class Traced(backends.TorchBackend):  # type: ignore[name-defined,misc]
        framework_name = "torch.fx"  # einops finds all subclasses, and asks those of known modules

        def is_appropriate_type(self, tensor: Any) -> bool:
            return isinstance(tensor, fx.Proxy)

        def shape(self, x: Any) -> list[Any]:
            return list(x.shape)

    return Traced


@functools.lru_cache(1024)
def _unpacked(code: types.CodeType, at: int) -> int | None:
    """How many values an instruction of a function unpacks, if it does so."""
    instruction = next(found for found in dis.get_instructions(code) if found.offset >= at)
    return instruction.argval if instruction.opname == "UNPACK_SEQUENCE" else None


class _Symbolic(SharedTracer):
    """Records what forward() does to buffers, instead of doing it while tracing."""

    proxy_buffer_attributes = True

    def __init__(self, given: Mapping[str, Any], through: bool) -> None:
        super().__init__()
        self._constants = {k: v for k, v in given.items() if v is None or type(v) in (bool, str)}
        self._examples = {k: v for k, v in given.items() if k not in self._constants}
        self._through = through
        self._known: dict[fx.Node, Any] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Every child stays as it is."""
        return True

    def create_arg(self, a: Any) -> Any:
        """Refuse what forward() has computed from parameters outside of the program."""
        if isinstance(a, Tensor) and a.grad_fn is not None and a not in self.tensor_attrs:
            raise TypeError("torch.fx does not see that parameters are used")
        return super().create_arg(a)

    def create_proxy(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> Any:
        """Pass constants themselves to forward(), and check later calls for them."""
        if self._through and kind == "call_function" and _wrapped(target):
            return target(*args[0], **args[1])
        proxy = super().create_proxy(kind, target, *args, **kwargs)
        if kind != "placeholder" or target not in self._constants:
            return proxy
        value = self._constants[target]
        super().create_proxy("call_function", require_same, (proxy, value, target), {})
        return value

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """A value that knows how to be set in part."""
        return _Proxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Take the branch that the sizes of the example take, and check later calls for it."""
        value = self._value(obj.node)
        if isinstance(value, Tensor):
            return super().to_bool(obj)
        super().create_proxy("call_function", require_branch, (obj, bool(value)), {})
        return bool(value)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """As many items as the example has; checked in later calls."""
        value = self._value(obj.node)
        if isinstance(value, Tensor):
            return super().iter(obj)
        count = value.__len__()
        found = super().create_proxy("call_function", len, (obj,), {})
        super().create_proxy("call_function", require_same, (found, count, "a length"), {})
        return iter(
            [
                self.create_proxy("call_function", operator.getitem, (obj, at), {})
                for at in range(count)
            ]
        )

    def number(self, obj: fx.Proxy) -> float:
        """The number that the example has; checked in later calls."""
        value = self._value(obj.node)
        if not isinstance(value, (int, float)):
            raise TypeError("forward() makes a number of a value")
        bool(operator.eq(obj, value))
        return value

    def _value(self, node: fx.Node) -> Any:
        """What a node gives for the example, tensors on the meta device."""
        if node not in self._known:
            args, kwargs = fx.map_arg((node.args, node.kwargs), self._value)
            if node.op == "placeholder":
                value = self._examples[str(node.target)]
            elif node.target is getattr and args[1] in ("device", "is_cuda", "is_meta"):
                raise TypeError("forward() branches on a device")  # the example has another one
            elif node.op == "call_function":
                value = node.target(*args, **kwargs)  # type: ignore[operator]
            elif node.op == "call_method":
                value = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            elif node.op == "call_module":
                value = self._examples[f"{node.target}()"]
            else:
                tensors = [*self.root.named_parameters(), *self.root.named_buffers()]
                value = (
                    dict(tensors)[str(node.target)].detach().to("meta")
                )  # getattr() would give a proxy
            self._known[node] = value
        return self._known[node]


def _wrapped(target: Any) -> bool:
    """Whether a function is one that ``torch.fx.wrap`` names."""
    names = getattr(_symbolic_trace, "_wrapped_fns_to_patch", {})
    own = isinstance(target, types.FunctionType)
    return own and (id(target.__globals__), target.__name__) in names


def require_branch(given: Any, value: bool) -> None:
    """Refuse inputs of sizes that the program was not made for.

    Raises:
        ArgumentError: forward() would take another branch than for the example.
    """
    if bool(given) is not value:
        raise ArgumentError(
            "forward() does something else for inputs of this size than for those of "
            "example_inputs, which the program was made for; make it again with inputs of this size"
        )


def require_same(given: Any, value: Any, name: str) -> None:
    """Refuse an argument that the program was not made for.

    Raises:
        ArgumentError: it differs from that of the example.
    """
    if isinstance(given, fx.Proxy):  # a program that is unpickled is traced again
        given.tracer.create_proxy("call_function", require_same, (given, value, name), {})
    elif given is not value and given != value:
        raise ArgumentError(
            f"{name} is {given!r}; the program was made for {name}={value!r}, as in example_inputs"
        )


def _symbolic(model: nn.Module, given: Mapping[str, Any], through: bool) -> fx.GraphModule:
    """Trace, and take down the constants that torch.fx hangs on the model."""
    if hasattr(sys.modules.get("einops._backends"), "TorchBackend"):
        _known_to_einops()
    held = {
        k: v for k, v in vars(model).items() if type(v) in (dict, list, set) and k[0] != "_"
    }  # such as caches, in which forward() would leave what is none of a tensor
    known, kind = set(vars(model)), type(model)
    tracer = _Symbolic(given, through)
    own = vars(model).get("forward")  # a method that the constructor has chosen
    if getattr(own, "__self__", None) is model:
        tracer.traced_func_name = own.__name__  # type: ignore[union-attr]
    if kind.forward is nn.MultiheadAttention.forward:
        model.__class__ = Traceable
    try:
        vars(model).update({key: copy.copy(value) for key, value in held.items()})
        with noted(tracer), whole(tracer):
            graph = tracer.trace(model)
        for node in reversed(list(graph.nodes)):  # what one mode asks for, but does not use
            if not _wrapped(node.target):
                node.meta.pop("is_wrapped", None)  # it came from inside of such a function
            if not node.users and (node.op == "get_attr" or node.target in _LOOKS):
                graph.erase_node(node)
        return Uncompiled(model, graph, kind.__name__)
    finally:
        model.__class__ = kind
        vars(model).update(held)
        for name in set(vars(model)) - known:
            delattr(model, name)


_LOOKS = (getattr, operator.getitem)
"""Calls that do nothing if nobody wants their result."""


def _as_module(dense: fx.GraphModule, node: fx.Node, args: Any, kwargs: Any) -> bool:
    """Turn ``F.dropout(..., training=self.training)`` into a module that knows its mode."""
    kind = {F.dropout: nn.Dropout, F.dropout2d: nn.Dropout2d}.get(node.target)  # type: ignore[arg-type]
    keyed = {**node.kwargs, "training": None} == {**kwargs, "training": None}
    if kind is None or not keyed or node.args != args:
        return False
    p = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
    name = f"psap_{node.name}"
    dense.add_submodule(name, kind(p))  # type: ignore[arg-type]
    node.op, node.target = "call_module", name
    node.args, node.kwargs = node.args[:1], {}
    return True


class ByMode(nn.Module):
    """A number or switch that differs between train and evaluation mode."""

    def __init__(self, train: Any, evaluation: Any) -> None:
        super().__init__()
        self.values = evaluation, train

    def forward(self) -> Any:
        """The value of the mode that the module is in."""
        return self.values[self.training]


def _by_mode(dense: fx.GraphModule, node: fx.Node, trained: Any) -> bool:
    """Let a module choose among constants that differ, such as ``training=self.training``."""
    (leaves, spec), (others, same) = map(tree_flatten, ((node.args, node.kwargs), trained))
    if spec != same:
        return False
    for at, (leaf, other) in enumerate(zip(leaves, others, strict=True)):
        if leaf == other:
            continue
        if not all(type(v) in (bool, int, float) for v in (leaf, other)):
            return False
        name = f"psap_{node.name}_{at}"
        dense.add_submodule(name, ByMode(other, leaf))
        with dense.graph.inserting_before(node):
            leaves[at] = dense.graph.call_module(name)
    node.args, node.kwargs = tree_unflatten(leaves, spec)
    return True
