"""Graph modules whose code is generated and compiled once for all graphs that say the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import fx, nn


class Program(fx.GraphModule):
    """A graph module that keeps the attributes of the module it stands for, in copies, too.

    Whoever calls a module may read them: where it stands in a list of layers, its stride.
    """

    def keep(self, attributes: dict[str, Any]) -> None:
        """Take attributes of a module, except those that a graph module has of its own."""
        vars(self).update({k: v for k, v in attributes.items() if not hasattr(self, k)})

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        """A copy of everything: that of a graph module has only what its graph uses."""
        made: Program = super().__deepcopy__(memo)  # type: ignore[assignment]
        missing = {k: v for k, v in vars(self).items() if not hasattr(made, k)}
        made.keep(copy.deepcopy(missing, memo))
        return made

    def __reduce__(self) -> Any:
        """What is unpickled is a program, too."""
        return _unpickled, super().__reduce__()


def _unpickled(make: Callable[..., fx.GraphModule], given: tuple[Any, ...]) -> Program:
    plain = make(*given)
    made = Program(plain, plain.graph, type(plain).__name__)
    made.keep(vars(plain))
    return made


class Generator:
    """Makes programs; modules that are built alike mostly have programs that are, too."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[type[Program], dict[str, Any]]] = {}

    def module(self, body: nn.Module, graph: fx.Graph, name: str) -> Program:
        """What ``torch.fx.GraphModule(body, graph, name)`` gives, but for tensors and children."""
        text = _text(graph)
        if text in self._known:
            return _like(*self._known[text], body, graph, name)
        made = Program(body, graph, name)
        self._known[text] = (type(made), dict(vars(made)))  # it may keep attributes of its own yet
        return made


def _like(
    kind: type[Program], state: dict[str, Any], body: nn.Module, graph: fx.Graph, name: str
) -> Program:
    """A program with the code of another one, whose graph says the same.

    It has a class of its own, as every graph module has, so that ``recompile`` changes it alone.
    """
    own = {key: getattr(kind, key) for key in ("forward", "__module__", "__qualname__")}
    made: Program = object.__new__(type(name, (Program,), own))
    vars(made).update({key: copy.copy(value) for key, value in state.items()})
    for node in graph.nodes:
        if node.op == "get_attr" and node.target in vars(body):
            vars(made)[node.target] = vars(body)[node.target]
    vars(made)["_graph"] = graph
    graph.owning_module = made
    return made


def _text(graph: fx.Graph) -> str:
    """All that code is generated from: every call, with the names of its inputs and its result."""
    calls = []
    for node in graph.nodes:
        given = fx.map_arg((node.args, node.kwargs), lambda n: ("node", n.name))
        target = node.target if isinstance(node.target, str) else id(node.target)
        calls.append((node.op, node.name, target, given, node.type))
    return repr(calls)
