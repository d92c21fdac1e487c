"""A module's forward() as a torch.fx program that serves evaluation and training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from psap.errors import ArgumentError, VerificationError
from psap.graph.untouched import untouched
from psap.shared import SharedTracer, Uncompiled


def traced(model: nn.Module, constants: Mapping[str, Any]) -> fx.GraphModule:
    """The module as a program that serves both modes; its children stay calls of modules.

    Args:
        model: the module.
        constants: arguments such as ``mask=None``, on which forward() may branch.

    Raises:
        VerificationError: torch.fx cannot trace it, or it does different things in the two modes.
    """
    try:
        with untouched(model):
            trained = _symbolic(model.train(), constants)
            dense = _symbolic(model.eval(), constants)
    except Exception as error:
        raise VerificationError(
            f"torch.fx cannot trace {type(model).__name__}: {type(error).__name__}: {error}"
        ) from error
    pairs = list(zip(dense.graph.nodes, trained.graph.nodes, strict=False))
    same = len(dense.graph.nodes) == len(trained.graph.nodes)
    for node, other in pairs:
        if same and str((node.args, node.kwargs)) != str((other.args, other.kwargs)):
            same = _as_module(dense, node, other)
        same = same and (node.op, node.target) == (other.op, other.target)
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


class _Symbolic(SharedTracer):
    """Records what forward() does to buffers, instead of doing it while tracing."""

    proxy_buffer_attributes = True

    def __init__(self, constants: Mapping[str, Any]) -> None:
        super().__init__()
        self._constants = constants

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Every child stays as it is."""
        return True

    def create_proxy(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> Any:
        """Pass constants themselves to forward(), and check later calls for them."""
        proxy = super().create_proxy(kind, target, *args, **kwargs)
        if kind != "placeholder" or target not in self._constants:
            return proxy
        value = self._constants[target]
        super().create_proxy("call_function", require_same, (proxy, value, target), {})
        return value


def require_same(given: Any, value: Any, name: str) -> None:
    """Refuse an argument that the program was not made for.

    Raises:
        ArgumentError: it differs from that of the example.
    """
    if given is not value and given != value:
        raise ArgumentError(
            f"{name} is {given!r}; the program was made for {name}={value!r}, as in example_inputs"
        )


def _symbolic(model: nn.Module, constants: Mapping[str, Any]) -> fx.GraphModule:
    """Trace, and take down the constants that torch.fx hangs on the model."""
    known = set(vars(model))
    tracer = _Symbolic(constants)
    own = vars(model).get("forward")  # a method that the constructor has chosen
    if getattr(own, "__self__", None) is model:
        tracer.traced_func_name = own.__name__  # type: ignore[union-attr]
    try:
        return Uncompiled(model, tracer.trace(model), type(model).__name__)
    finally:
        for name in set(vars(model)) - known:
            delattr(model, name)


def _as_module(dense: fx.GraphModule, node: fx.Node, trained: fx.Node) -> bool:
    """Turn ``F.dropout(..., training=self.training)`` into a module that knows its mode."""
    kind = {F.dropout: nn.Dropout, F.dropout2d: nn.Dropout2d}.get(node.target)  # type: ignore[arg-type]
    keyed = {**node.kwargs, "training": None} == {**trained.kwargs, "training": None}
    if kind is None or not keyed or str(node.args) != str(trained.args):
        return False
    p = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
    name = f"psap_{node.name}"
    dense.add_submodule(name, kind(p))  # type: ignore[arg-type]
    node.op = trained.op = "call_module"
    node.target = trained.target = name
    node.args, node.kwargs = node.args[:1], {}
    return True
