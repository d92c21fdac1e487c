"""Graph modules whose code is generated and compiled once for all graphs that say the same."""

from __future__ import annotations

import copy
import sys
from abc import ABCMeta
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from psap.contexts import Retracer, blocks


class Program(fx.GraphModule):
    """A graph module that passes for the module it stands for: attributes, methods, and its class.

    Whoever holds a module may ask for them: where it stands in a list of layers, whether it is one
    of those that take a second input, how many layers it has; and it may train in a way of its own.
    """

    @property
    def __class__(self) -> type:
        """The class that it stands for, which ``isinstance`` looks at as well; with its forward."""
        kind = vars(self).get("_stands_for")
        return type(self) if kind is None else _face(type(self), kind)

    @__class__.setter
    def __class__(self, kind: type) -> None:
        vars(object)["__class__"].__set__(self, kind)

    def stand_for(self, attributes: dict[str, Any], kind: type | None) -> None:
        """Take the class and attributes of a module, but those that a graph module has itself."""
        kind = attributes.get("_stands_for") or kind
        own = {k: v for k, v in attributes.items() if not hasattr(self, k)}
        if kind is not None:
            own["_stands_for"] = kind
            for name, value in _defined(kind).items():
                setattr(type(self), name, value)
        vars(self).update(own)

    def recompile(self) -> Any:
        """Generate the code, with ``with`` statements for the blocks of forward()."""
        self.graph.on_generate_code(lambda known: known or blocks)
        return super().recompile()

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


def _face(own: Any, kind: type[Any]) -> type:
    """A subclass of the class that a program stands for, with the forward of the program.

    ``torch.compile`` asks the class of a module for its methods, and would call the dense forward.
    A class that counts its subclasses is taken itself.
    """
    face: type[Any] | None = vars(own).get("_psap_face")
    if face is not None and issubclass(face, kind) and face.forward is own.forward:
        return face
    counts = any("__init_subclass__" in vars(base) for base in kind.__mro__[:-1])
    if counts or type(kind) not in (type, ABCMeta):
        return kind
    names = {key: getattr(kind, key) for key in ("__module__", "__qualname__", "__doc__")}
    made: Any = type(kind)  # the metaclass
    face = made(kind.__name__, (kind,), {**names, "forward": own.forward})
    own._psap_face = face
    return face


CONTAINER = ("len", "iter", "getitem", "setitem", "delitem", "contains", "reversed")
"""Special methods that a program takes over; of the others a graph module has its own."""


def _defined(kind: type) -> dict[str, Any]:
    """What a class of modules and its bases define and a graph module does not, as it stands there.

    All but ``forward`` may take the place of what `torch.nn.Module` defines: ``train``, for one.
    """
    special = {f"__{name}__" for name in CONTAINER}
    found: dict[str, Any] = {}
    for base in reversed([b for b in kind.__mro__ if not issubclass(Program, b)]):
        found |= vars(base)
    taken = {name for base in (Program, fx.GraphModule) for name in vars(base)} | {"forward"}
    plain = {name for name in found if not name.startswith(("__", "_abc_"))}
    return {name: found[name] for name in (plain - taken) | (special & found.keys())}


def _unpickled(
    make: Callable[..., fx.GraphModule], given: tuple[Any, ...], kind: type | None
) -> Program:
    given[0]["_tracer_cls"] = Retracer
    plain = make(*given)
    made = Program(plain, plain.graph, type(plain).__name__)
    for table in ("_modules", "_parameters", "_buffers"):  # what the graph does not use, too
        for name, part in given[0].get(table, {}).items():
            vars(made)[table].setdefault(name, part)
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
