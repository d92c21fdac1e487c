"""What the dense programs of a model show when they run: shapes, labels, and what stays.

Where the trace of the plan knows what the modules were called with, they alone run again, on zeros;
else, or where that does not tell all, the whole model does.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from psap.graph.counting import Given
from psap.graph.labels import TAINT, Ints, plain
from psap.graph.rules import RULES
from psap.graph.trace import Tracer, following, run
from psap.openings import removed
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
        self._module = module
        self._program = program
        self._tracer = tracer
        self.record = Record()

    def run(self, *args: Any) -> Any:
        """Run the program; keep what rewriting needs to know about every value."""
        values: dict[fx.Node, Any] = {}
        given = iter(args)
        left = {node: len(node.users) for node in self._program.graph.nodes}
        for node in left:
            inputs, options = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            if node.op == "output":
                return inputs[0]
            values[node] = self._value(node, inputs, options, given)
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
        found = operator.attrgetter(target)(self._program if added else self._module)
        return found(*args, **kwargs) if node.op == "call_module" else found

    def _note(self, node: fx.Node, value: Any) -> None:
        if isinstance(value, Tensor):
            labels = self._tracer.get(value)
            view = self._tracer.view(value)
            if labels is not None:
                self.record.labels[node] = labels
            elif view is not None:
                self.record.views[node] = view
            self.record.values[node] = value.shape
        elif isinstance(value, (tuple, list)) and all(isinstance(v, Tensor) for v in value):
            self.record.values[node] = [v.shape for v in value]
        else:
            self.record.values[node] = value


def recorded(
    model: nn.Module,
    dense: Mapping[str, fx.GraphModule],
    inputs: tuple[Any, ...],
    plan: Plan,
    *,
    alone: bool,
) -> tuple[dict[str, Record], Ints]:
    """Run programs of modules under a label tracer.

    Args:
        model: the dense model; it is not changed.
        dense: the programs, by the names of the modules.
        inputs: inputs of the model's dtype.
        plan: the plan.
        alone: whether ``inputs`` are those of the plan's trace, so that what it saw may do.

    Returns:
        What each program showed, and for every label 1 if its channel stays, else 0.
    """
    alive = None
    if alone and plan.graph is not None and all(map(plan.graph.entries.get, _outermost(dense))):
        tracer, recorders = _recorders(model, dense)
        alive = _replayed(model, recorders, plan, tracer)
    if alive is None:
        tracer, recorders = _recorders(model, dense)
        with untouched(model), _through(model, recorders):
            run(tracer, model, inputs, training=False)
        alive = living(tracer, plan)
    kept = plan.kept()
    records = {name: recorder.record for name, recorder in recorders.items()}
    for record in records.values():
        record.labels = {node: plain(labels) for node, labels in record.labels.items()}
        record.kept, record.shapes = kept, tracer.shapes
    return records, alive


def _recorders(
    model: nn.Module, dense: Mapping[str, fx.GraphModule]
) -> tuple[Tracer, dict[str, _Recorder]]:
    tracer = Tracer(model, RULES)
    made = {n: _Recorder(model.get_submodule(n), part, tracer) for n, part in dense.items()}
    return tracer, made


def _outermost(names: Mapping[str, Any]) -> list[str]:
    """Those modules that are within no other one."""
    found: list[str] = []
    for name in sorted(names, key=lambda n: n.split(".") if n else []):
        if not (found and (not found[-1] or name.startswith(f"{found[-1]}."))):
            found.append(name)
    return found


def _replayed(
    model: nn.Module, recorders: Mapping[str, _Recorder], plan: Plan, tracer: Tracer
) -> Ints | None:
    """Run the programs alone, on what their modules were called with in the plan's trace.

    Returns:
        For every label 1 if its channel stays, else 0; None if that does not tell all of them.
    """
    graph, gone = plan.graph, removed(plan)
    if graph is None or gone is None:
        return None
    channels = tracer.labels.new(gone.size)  # the last one is for what is fixed
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    entries = {name: graph.entries[name] or [] for name in _outermost(recorders)}
    given = [x for values in entries.values() for x in _flat(values) if isinstance(x, Given)]
    if like is None or any((x.dtype, x.device) != (like.dtype, like.device) for x in given):
        return None
    made = {n: _made(x, graph.channel_of, channels, tracer) for n, x in entries.items()}
    try:
        with untouched(model), _through(model, recorders), following(tracer):
            for name, values in made.items():
                model.get_submodule(name).eval()
                recorders[name].run(*values)
    except Exception:  # the whole model will show what fails
        return None
    sides = [
        (labels, graph.channels[side])
        for side, labels in tracer.along.items()
        if side in graph.channels
    ]
    used = [labels for r in recorders.values() for labels in r.record.labels.values()]
    return _told([(channels, np.arange(gone.size)), *sides], gone, used, tracer)


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if type(value) in (list, tuple):
            yield from _flat(value)
        else:
            yield value


def _made(values: Any, channel_of: Ints, channels: Tensor, tracer: Tracer) -> Any:
    """Arguments: zeros in place of tensors, with the labels of their channels."""
    made: list[Any] = []
    for value in values:
        if isinstance(value, Given):
            room = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride, strict=True))
            x = torch.zeros(room, dtype=value.dtype, device=value.device)
            x = x.as_strided(value.shape, value.stride)
            if value.labels is not None:
                found = torch.from_numpy(channel_of[plain(value.labels).numpy()])
                tracer.set(x, channels[found] | value.labels & TAINT)  # -1 is the last one
            made.append(x)
        elif type(value) in (list, tuple):
            made.append(type(value)(_made(value, channel_of, channels, tracer)))
        else:
            made.append(value)
    return made


def _told(
    known: list[tuple[Tensor, Ints]],
    gone: np.ndarray[Any, np.dtype[np.bool_]],
    used: list[Tensor],
    tracer: Tracer,
) -> Ints | None:
    """For every label whether it stays, if all that are used are united with known ones."""
    root, frozen = tracer.labels.resolve()
    labels = np.concatenate([root[plain(found).numpy()] for found, _ in known])
    goes = np.concatenate([gone[channels] for _, channels in known])
    state = np.full(tracer.labels.count, -1, dtype=np.int64)
    state[labels[goes]] = 0
    stays = np.concatenate([labels[~goes], np.fromiter(frozen, dtype=np.int64)])
    if (state[stays] == 0).any():
        return None
    state[stays] = 1
    if any((state[root[plain(found).numpy()]] < 0).any() for found in used):
        return None
    alive: Ints = state[root]
    return np.abs(alive)


@contextmanager
def _through(model: nn.Module, recorders: Mapping[str, _Recorder]) -> Iterator[None]:
    """Let the recorders take the calls of their modules."""
    before: list[tuple[nn.Module, Any]] = []
    try:
        for name, recorder in recorders.items():
            module = model.get_submodule(name)
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
