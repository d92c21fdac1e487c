"""Graph modules whose code is generated once for all graphs that say the same."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import fx, nn


class Generator:
    """Makes graph modules; modules that are built alike mostly have programs that are, too."""

    def __init__(self) -> None:
        self._known: dict[str, Any] = {}

    def module(self, body: nn.Module, graph: fx.Graph, name: str) -> fx.GraphModule:
        """What ``torch.fx.GraphModule(body, graph, name)`` gives."""
        text = _text(graph)

        def python_code(*args: Any, **options: Any) -> Any:
            if text not in self._known:
                self._known[text] = fx.Graph.python_code(graph, *args, **options)
            code = self._known[text]
            return dataclasses.replace(code, globals=dict(code.globals))  # gets forward(), too

        vars(graph)["python_code"] = python_code
        try:
            return fx.GraphModule(body, graph, name)
        finally:
            del vars(graph)["python_code"]


def _text(graph: fx.Graph) -> str:
    """All that code is generated from: every call, with the names of its inputs and its result."""
    calls = []
    for node in graph.nodes:
        given = fx.map_arg((node.args, node.kwargs), lambda n: ("node", n.name))
        target = node.target if isinstance(node.target, str) else id(node.target)
        calls.append((node.op, node.name, target, given, node.type))
    return repr(calls)
