"""Graph modules whose code is generated and compiled once for all graphs that say the same."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

from torch import fx, nn


class Program(fx.GraphModule):
    """A graph module that passes for the module it stands for: by its attributes and its class.

    Whoever calls a module may ask for them: where it stands in a list of layers, whether it is one
    of those that take a second input.
    """

    @property
    def __class__(self) -> type:
        """The class that it stands for, which ``isinstance`` looks at as well."""
        return vars(self).get("_stands_for", type(self))  # type: ignore[no-any-return]

    @__class__.setter
    def __class__(self, kind: type) -> None:
        vars(object)["__class__"].__set__(self, kind)

    def stand_for(self, attributes: dict[str, Any], kind: type | None) -> None:
        """Take the class and attributes of a module, but those that a graph module has itself."""
        vars(self).update({k: v for k, v in attributes.items() if not hasattr(self, k)})
        if kind is not None:
            vars(self)["_stands_for"] = kind

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        """A copy of everything: that of a graph module has only what its graph uses."""
        made: Program = super().__deepcopy__(memo)  # type: ignore[assignment]
        missing = {k: v for k, v in vars(self).items() if not hasattr(made, k)}
        made.stand_for(copy.deepcopy(missing, memo), None)
        return made

    def __reduce__(self) -> Any:
        """What is unpickled is a program, too; of a class that can be imported, if this is one."""
        make, (attributes, *rest) = super().__reduce__()
        kind = attributes.pop("_stands_for", None)
        known = getattr(sys.modules.get(kind.__module__), kind.__qualname__, None) if kind else None
        return _unpickled, (make, (attributes, *rest), kind if known is kind else None)


def _unpickled(
    make: Callable[..., fx.GraphModule], given: tuple[Any, ...], kind: type | None
) -> Program:
    plain = make(*given)
    made = Program(plain, plain.graph, type(plain).__name__)
    made.stand_for(vars(plain), kind)
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
