"""Graph modules whose code is generated and compiled once for all graphs that say the same."""

from __future__ import annotations

import copy

from torch import fx, nn


class Generator:
    """Makes graph modules; modules that are built alike mostly have programs that are, too."""

    def __init__(self) -> None:
        self._known: dict[str, fx.GraphModule] = {}

    def module(self, body: nn.Module, graph: fx.Graph, name: str) -> fx.GraphModule:
        """What ``torch.fx.GraphModule(body, graph, name)`` gives, but for tensors and children."""
        text = _text(graph)
        if text in self._known:
            return _like(self._known[text], body, graph, name)
        self._known[text] = fx.GraphModule(body, graph, name)
        return self._known[text]


def _like(first: fx.GraphModule, body: nn.Module, graph: fx.Graph, name: str) -> fx.GraphModule:
    """A graph module with the code of another one, whose graph says the same.

    It has a class of its own, as every graph module has, so that ``recompile`` changes it alone.
    """
    kind = type(first)
    own = {key: getattr(kind, key) for key in ("forward", "__module__", "__qualname__")}
    made: fx.GraphModule = object.__new__(type(name, (fx.GraphModule,), own))
    vars(made).update({key: copy.copy(value) for key, value in vars(first).items()})
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
