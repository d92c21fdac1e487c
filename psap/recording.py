"""What the dense programs of a model show when they run: shapes, labels, and what stays.

Where the trace of the plan knows what the modules were called with, they alone run again, on zeros;
else, or where that does not tell all, the whole model does.
"""

from __future__ import annotations

import dataclasses
import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from psap.contexts import interpreting
from psap.graph import Graph, Side
from psap.graph.counting import Given
from psap.graph.inputs import Inputs
from psap.graph.labels import TAINT, Ints, plain
from psap.graph.rules import RULES
from psap.graph.trace import Tracer, following, run
from psap.members import all_tensors, named_modules
from psap.openings import Bools
from psap.plans import Plan
from psap.sizes import Record
from psap.untouched import untouched

ADDED = ("psap_", "_tensor_constant")
"""What names of modules and of buffers begin with that only a program has."""


class _Recorder:
    """Runs a dense program on a module and notes shapes and labels of every value.

    Args:
        module: the module, or one that is built alike.
        program: its dense program.
        tracer: what follows the labels.
    """

    def __init__(self, module: nn.Module, program: fx.GraphModule, tracer: Tracer) -> None:
        self.module = module
        self._program = program
        self._tracer = tracer
        self._record = Record()

    def run(self, *args: Any) -> Any:
        """Run the program; keep what rewriting needs to know about every value."""
        with interpreting() as interpreted:
            return self._run(iter(args), interpreted)

    def _run(self, given: Iterator[Any], interpreted: Callable[[fx.Node, Any], None]) -> Any:
        values: dict[fx.Node, Any] = {}
        left = {node: len(node.users) for node in self._program.graph.nodes}
        for node in left:
            inputs, options = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            if node.op == "output":
                return inputs[0]
            values[node] = self._value(node, _mutable(inputs), _mutable(options), given)
            interpreted(node, values[node])
            with torch._C.DisableTorchFunction():  # asking for a shape here is no call of forward()
                self._note(node, values[node])
            for used in node.all_input_nodes:
                left[used] -= 1
                if not left[used]:
                    del values[used]
        return None

    def _value(self, node: fx.Node, args: Any, kwargs: Any, given: Iterator[Any]) -> Any:
        target: Any = node.target
        if node.op == "placeholder":
            return list(given) if target.startswith("*") else next(given, *args)
        if node.op == "call_function":
            return target(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        added = target.startswith(ADDED) and hasattr(self._program, target)
        found = operator.attrgetter(target)(self._program if added else self.module)
        return found(*args, **kwargs) if node.op == "call_module" else found

    def shown(self) -> Record:
        """What the runs have shown, with labels without taint."""
        labels = self._record.labels
        self._record.labels = {node: plain(found) for node, found in labels.items()}
        return self._record

    def _note(self, node: fx.Node, value: Any) -> None:
        if isinstance(value, Tensor):
            labels = self._tracer.get(value)
            view = self._tracer.view(value)
            if labels is not None:
                self._record.labels[node] = labels
            elif view is not None:
                self._record.views[node] = view
            self._record.values[node] = value.shape
        elif isinstance(value, (tuple, list)) and all(isinstance(v, Tensor) for v in value):
            self._record.values[node] = [v.shape for v in value]
        else:
            self._record.values[node] = value


def _mutable(value: Any) -> Any:
    """Arguments that whom they are given to may change: torch.fx has lists that nobody may."""
    if isinstance(value, list):
        return [_mutable(item) for item in value]
    if isinstance(value, dict):
        return {key: _mutable(item) for key, item in value.items()}
    return tuple(map(_mutable, value)) if type(value) is tuple else value


Records = dict[str, tuple[Record, Ints]]
"""By module what its program showed, and for every label in that 1 if its channel stays, else 0."""


def recorded(
    model: nn.Module,
    dense: Mapping[str, fx.GraphModule],
    inputs: Inputs,
    plan: Plan,
    gone: Bools | None,
) -> Records:
    """Run programs of modules under a label tracer.

    Args:
        model: the dense model; it is not changed.
        dense: the programs, by the names of the modules.
        inputs: inputs of the model's dtype.
        plan: the plan.
        gone: which channels of the plan's graph go, if ``inputs`` are those of its trace, so that
            what it saw may do.
    """
    shapes = {name: tuple(t.shape) for name, t in all_tensors(model).items()}
    records = None if gone is None else _replayed(model, dense, plan.graph, gone)
    if records is None:
        tracer, recorders = _recorders(model, dense)
        with untouched(model), _through(recorders):
            run(tracer, model, inputs, training=False)
        alive = living(tracer, plan)
        records = {name: (recorder.shown(), alive) for name, recorder in recorders.items()}
    kept = plan.kept()
    for record, _ in records.values():
        record.kept, record.shapes = kept, shapes
    return records


def _recorders(
    model: nn.Module, dense: Mapping[str, fx.GraphModule]
) -> tuple[Tracer, dict[str, _Recorder]]:
    tracer, held = Tracer(model, RULES), dict(named_modules(model))
    return tracer, {name: _Recorder(held[name], part, tracer) for name, part in dense.items()}


def _outermost(names: Mapping[str, Any]) -> dict[str, list[str]]:
    """Those modules that are within no other one, and which ones are within each, itself too."""
    found: dict[str, list[str]] = {}
    last = None
    for name in sorted(names, key=lambda n: n.split(".") if n else []):
        if last is None or (last and not name.startswith(f"{last}.")):
            last = name
        found.setdefault(last, []).append(name)
    return found


def _replayed(
    model: nn.Module, dense: Mapping[str, fx.GraphModule], graph: Graph | None, gone: Bools
) -> Records | None:
    """Run the programs alone, on what their modules were called with in the plan's trace.

    Of modules that are built alike, and called alike but for the channels, one is run.

    Returns:
        The records; None if that does not tell all of them.
    """
    outer = _outermost(dense)
    if graph is None or not all(map(graph.entries.get, outer)):
        return None
    entries = {name: list(_flat(graph.entries[name] or [])) for name in outer}
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    given = [x for values in entries.values() for x in values if isinstance(x, Given)]
    if like is None or any((x.dtype, x.device) != (like.dtype, like.device) for x in given):
        return None
    families: dict[Any, list[str]] = {}
    for name, inside in outer.items():
        programs = tuple((n[len(name) :], id(dense[n])) for n in inside)
        form = tuple(map(_form, entries[name]))
        families.setdefault((programs, form), []).append(name)
    firsts = [name for name, *_ in families.values()]
    run_alone = {n: dense[n] for name in firsts for n in outer[name]}
    tracer, recorders = _recorders(model, run_alone)
    met: dict[str, tuple[list[Tensor], set[str]]] = {}
    try:
        with untouched(model), _through(recorders), following(tracer):
            for name in firsts:
                met[name] = _run(graph.entries[name], recorders[name], tracer)
    except Exception:  # the whole model will show what fails
        return None
    records: Records = {}
    resolved = tracer.labels.resolve()
    for names in families.values():
        shown = {n: recorders[n].shown() for n in outer[names[0]]}
        told = _Told(resolved, tracer.along, names[0], shown, *met[names[0]])
        if not all(told.of(name, entries[name], graph, gone, records) for name in names):
            return None
    return records


def _run(values: Any, recorder: _Recorder, tracer: Tracer) -> tuple[list[Tensor], set[str]]:
    """Run one program; returns the labels that its arguments got, and the tensors that it used."""
    with torch._C.DisableTorchFunction():
        bases: list[Tensor] = []
        made = _made(values, bases, tracer)
    tracer.reached = set()
    recorder.module.eval()
    recorder.run(*made)
    return bases, tracer.reached


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if type(value) in (list, tuple):
            yield type(value), len(value)
            yield from _flat(value)
        else:
            yield value


def _form(value: Any) -> Any:
    """What two arguments have in common that differ in their channels alone."""
    if not isinstance(value, Given):
        return type(value), value
    labels = value.labels
    tainted = None if labels is None else (labels.shape, (labels.numpy() >= TAINT).tobytes())
    return value.shape, value.stride, value.dtype, value.device, tainted


def _made(values: Any, bases: list[Tensor], tracer: Tracer) -> Any:
    """Arguments: zeros with labels of their own in place of tensors that have some."""
    made: list[Any] = []
    for value in values:
        if isinstance(value, Given):
            room = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride, strict=True))
            x = torch.zeros(room, dtype=value.dtype, device=value.device)
            x = x.as_strided(value.shape, value.stride)
            if value.labels is not None:
                bases.append(tracer.labels.new(value.labels.numel()).view(value.labels.shape))
                tracer.set(x, bases[-1] | value.labels & TAINT)
            made.append(x)
        elif type(value) in (list, tuple):
            made.append(type(value)(_made(value, bases, tracer)))
        else:
            made.append(value)
    return made


class _Told:
    """What the labels of a module that ran alone say of its channels, and of those of its like.

    Args:
        resolved: what `Labels.resolve` found.
        along: labels along sides of parameters.
        ran: the module.
        shown: its record, and those of modules within it.
        bases: labels of its arguments.
        used: names of tensors that it used.
    """

    def __init__(
        self,
        resolved: tuple[Ints, dict[int, str]],
        along: Mapping[Side, Tensor],
        ran: str,
        shown: Mapping[str, Record],
        bases: list[Tensor],
        used: set[str],
    ) -> None:
        root, frozen = resolved
        self._root, self._frozen = root, np.fromiter(frozen, dtype=np.int64)
        self._ran, self._shown = ran, shown
        self._used = used
        self._bases = [root[base.numpy()].reshape(-1) for base in bases]
        self._sides = {
            side: root[labels.numpy()] for side, labels in along.items() if side[0] in used
        }
        found = {id(x): x for record in shown.values() for x in record.labels.values()}
        self._wanted = np.concatenate(
            [_NONE, *(root[x.numpy()].reshape(-1) for x in found.values())]
        )

    def of(self, name: str, entry: list[Any], graph: Graph, gone: Bools, records: Records) -> bool:
        """Add the records of the module that ran, or of one that is like it.

        Args:
            name: the module.
            entry: what it was called with.
            graph: the graph of the plan.
            gone: which of its channels go.
            records: gets the records.

        Returns:
            Whether all labels in them are united with labels of known channels.
        """
        ran = self._ran
        if name != ran and not all(tensor.startswith(f"{ran}.") for tensor in self._used):
            return False

        def moved(there: str) -> str:
            return there if name == ran else name + there[len(ran) :]

        given = [x.labels for x in entry if isinstance(x, Given) and x.labels is not None]
        known = [
            (base, graph.channel_of[plain(labels).numpy()].reshape(-1))
            for base, labels in zip(self._bases, given, strict=True)
        ]
        for (tensor, dim), labels in self._sides.items():
            channels = graph.channels.get((moved(tensor), dim))
            if channels is not None:
                known.append((labels, channels))
        alive = self._alive(known, gone)
        if alive is None:
            return False
        for inner, record in self._shown.items():
            views = {
                node: dataclasses.replace(view, name=moved(view.name))
                for node, view in record.views.items()
            }
            copied = Record(labels=record.labels, values=record.values, views=views)
            records[moved(inner)] = copied, alive
        return True

    def _alive(self, known: list[tuple[Ints, Ints]], gone: Bools) -> Ints | None:
        """For every label whether it stays, if all that are wanted are united with known ones."""
        state = np.full(self._root.size, -1, dtype=np.int64)
        labels = np.concatenate([_NONE, *(labels for labels, _ in known)])
        goes = gone[np.concatenate([_NONE, *(channels for _, channels in known)])]
        state[labels[goes]] = 0
        stays = np.concatenate([labels[~goes], self._frozen])
        if (state[stays] == 0).any():
            return None
        state[stays] = 1
        if (state[self._wanted] < 0).any():
            return None
        alive: Ints = np.abs(state[self._root])
        return alive


_NONE = np.empty(0, dtype=np.int64)


@contextmanager
def _through(recorders: Mapping[str, _Recorder]) -> Iterator[None]:
    """Let the recorders take the calls of their modules."""
    before: list[tuple[nn.Module, Any]] = []
    try:
        for recorder in recorders.values():
            module = recorder.module
            before.append((module, vars(module).get("forward")))
            vars(module)["forward"] = _forward(module.forward, recorder)
        yield
    finally:
        for module, old in before:
            if old is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = old


def _forward(own: Callable[..., Any], recorder: _Recorder) -> Callable[..., Any]:
    """What a module's forward() computes, by its program."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(own).bind(*args, **kwargs)
        bound.apply_defaults()
        return recorder.run(*bound.args, *bound.kwargs.values())

    return forward


def living(tracer: Tracer, plan: Plan) -> Ints:
    """For every label 1 if its channel stays, else 0."""
    root, _ = tracer.labels.resolve()
    alive = np.ones(max(1, tracer.labels.count), dtype=np.int64)
    for side in plan.sides:
        labels = tracer.along.get((side.name, side.dim))
        if labels is not None:
            gone = np.ones(labels.numel(), dtype=bool)
            gone[np.array(side.kept, dtype=np.int64)] = False
            alive[root[labels.numpy()[gone]]] = 0
    result: Ints = alive[root]
    return result
