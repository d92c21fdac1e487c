"""Graph mode: a `torch.fx.GraphModule` whose fixed sizes are rewritten from the channel labels.

Where forward() fixes widths in Python (``F.pad`` of channels, ``view`` to a size, ``split`` in
pieces, slices), editing modules is not enough. The model is traced symbolically; the program is run
once under the label tracer; every constant that counts channels is then replaced by the number of
those that stay. Modules keep their names, so parameters do too, and the program trains.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from psap.errors import VerificationError
from psap.graph.groups import Side
from psap.graph.labels import Ints, plain
from psap.graph.rules import RULES
from psap.graph.trace import Tracer, output_tensors, untouched
from psap.openings import openings
from psap.plans import Plan

Stays = list[Tensor | None]
"""For every dimension of an activation a bool mask [size], or None if all of it stays."""


class _Recorder(fx.Interpreter):
    """Runs the dense program and notes shapes and labels of every value."""

    def __init__(self, module: fx.GraphModule, tracer: Tracer) -> None:
        super().__init__(module)
        self.tracer = tracer
        self.labels: dict[fx.Node, Tensor] = {}
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; keep what rewriting needs to know about its result."""
        value = super().run_node(n)
        if isinstance(value, Tensor):
            labels = self.tracer.get(value)
            if labels is not None:
                self.labels[n] = plain(labels)
            self.values[n] = value.shape
        elif isinstance(value, (tuple, list)) and all(isinstance(v, Tensor) for v in value):
            self.values[n] = [v.shape for v in value]
        else:
            self.values[n] = value
        return value


def program(
    model: nn.Module,
    plan: Plan,
    inputs: tuple[Any, ...],
    small_copy: Callable[[nn.Module, Plan], nn.Module],
) -> fx.GraphModule:
    """The small network of a plan as a program.

    Args:
        model: the dense model; it is not changed.
        plan: the plan.
        inputs: example inputs.
        small_copy: cuts the tensors of a copy of the model.

    Raises:
        VerificationError: the model cannot be traced symbolically, or a size cannot be rewritten.
    """
    cast = _cast(model, inputs)
    dense = _traced(model, openings(model, cast, lambda tracer: _alive(tracer, plan)))
    recorder = _record(dense, model, cast)
    alive = _alive(recorder.tracer, plan)
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(dense.graph, copied))
    for node, twin in copied.items():
        _rewrite(node, twin, recorder, alive)
    body = small_copy(model, plan)
    for name, module in dense.named_children():
        if name.startswith("psap_"):
            body.add_module(name, module.train(model.training))
    for name, constant in dense.named_buffers(recurse=False):
        if name.startswith("_tensor_constant"):
            body.register_buffer(name, constant, persistent=False)
    small = fx.GraphModule(body, graph, type(model).__name__)
    for kind in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        setattr(small, kind, getattr(body, kind))  # all of them, in the order of the model
    small.training = model.training
    return small


def _traced(model: nn.Module, opened: frozenset[str]) -> fx.GraphModule:
    """The model as a program that serves both modes.

    Raises:
        VerificationError: torch.fx cannot trace it, or it does different things in the two modes.
    """
    try:
        with untouched(model):
            trained = _symbolic(model.train(), opened)
            dense = _symbolic(model.eval(), opened)
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
    constants = [dict(program.named_buffers(recurse=False)) for program in (dense, trained)]
    same = same and all(
        name in constants[1] and torch.equal(value, constants[1][name])
        for name, value in constants[0].items()
        if name.startswith("_tensor_constant")
    )
    if not same:
        raise VerificationError(
            f"forward() of {type(model).__name__} does different things in train and in eval mode"
        )
    return dense


class _Symbolic(fx.Tracer):
    """Records what forward() does to buffers, instead of doing it while tracing."""

    proxy_buffer_attributes = True

    def __init__(self, opened: frozenset[str]) -> None:
        super().__init__()
        self._opened = opened

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module stays as it is."""
        return module_qualified_name not in self._opened


def _symbolic(model: nn.Module, opened: frozenset[str]) -> fx.GraphModule:
    """Trace, and take down the constants that torch.fx hangs on the model."""
    known = set(vars(model))
    try:
        return fx.GraphModule(model, _Symbolic(opened).trace(model), type(model).__name__)
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


def _cast(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    cast: tuple[Any, ...] = tree_map(
        lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, inputs
    )
    return cast


def _record(dense: fx.GraphModule, model: nn.Module, inputs: tuple[Any, ...]) -> _Recorder:
    tracer = Tracer(model, RULES)  # of the same tensors; by the names that the plan has
    recorder = _Recorder(dense, tracer)
    with untouched(dense), tracer:
        dense.eval()
        output = recorder.run(*inputs)
    for tensor in output_tensors(output):
        labels = tracer.get(tensor)
        if labels is not None:
            tracer.labels.freeze(labels, "output of the model")
    return recorder


def _alive(tracer: Tracer, plan: Plan) -> Ints:
    """For every label 1 if its channel stays, else 0."""
    root, _ = tracer.labels.resolve()
    alive = torch.ones(max(1, tracer.labels.count), dtype=torch.int64).numpy()
    kept: Mapping[Side, tuple[int, ...]] = {(s.name, s.dim): s.kept for s in plan.sides}
    for side, labels in tracer.along.items():
        if side in kept:
            gone = torch.ones(labels.numel(), dtype=torch.bool)
            gone[list(kept[side])] = False
            alive[root[labels[gone].numpy()]] = 0
    result: Ints = alive[root]
    return result


def _stays(node: Any, recorder: _Recorder, alive: Ints) -> Stays | None:
    """Which positions of an activation stay, per dimension; None if nothing goes."""
    labels = recorder.labels.get(node)
    if labels is None:
        return None
    lives = torch.from_numpy(alive)[labels].bool()
    if bool(lives.all()):
        return None
    if not bool(lives.any()) and len(recorder.values[node]) > 1:
        gone = torch.zeros(recorder.values[node][1], dtype=torch.bool)  # a slice of what goes
        return [gone if dim == 1 else None for dim in range(lives.dim())]
    masks: Stays = []
    for dim in range(lives.dim()):
        others = [d for d in range(lives.dim()) if d != dim]
        along = lives.amax(others) if others else lives
        masks.append(None if along.numel() == 1 else along)
    outer = torch.ones_like(lives)
    for dim, mask in enumerate(masks):
        if mask is not None:
            outer &= mask.view([-1 if d == dim else 1 for d in range(lives.dim())])
    if not torch.equal(outer, lives):
        raise VerificationError(
            f"the channels of {node.name} cannot be removed: they form no block"
        )
    return masks


def _kept_before(mask: Tensor | None, index: int) -> int:
    return index if mask is None else int(mask[:index].sum())


def _rewrite(node: fx.Node, twin: fx.Node, recorder: _Recorder, alive: Ints) -> None:
    """Replace the constants of one call, if it has any that count channels."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.op not in ("call_function", "call_method") or not node.args:
        return
    source = node.args[0]
    if not isinstance(source, fx.Node):
        return
    if name in ("view", "reshape", "flatten", "expand", "pad"):
        stays = _stays(node, recorder, alive)
        if stays is not None and name == "pad":
            _pad(twin, recorder.values[source], recorder.values[node], stays)
        elif stays is not None:
            _sizes(node, twin, recorder, stays)
        return
    before = _stays(source, recorder, alive)
    if node.target is operator.getitem and before is not None:
        _slices(twin, node.args[1], recorder.values[source], before)
    elif name in ("split", "chunk", "tensor_split") and before is not None:
        _split(node, twin, recorder.values[source], recorder.values[node], before)
    elif name.startswith("conv") and before is not None:
        _groups(twin, recorder.values[source], before)
    elif name == "narrow" and before is not None:
        raise VerificationError(f"narrow at {node.name} has no rewriting rule")


def _sizes(node: fx.Node, twin: fx.Node, recorder: _Recorder, stays: Stays) -> None:
    if node.target in (torch.flatten,) or node.target == "flatten":
        return
    packed = len(node.args) == 2 and isinstance(node.args[1], (tuple, list))
    given = node.args[1] if len(node.args) == 2 else None
    if isinstance(given, fx.Node) and isinstance(recorder.values[given], torch.Size):
        return  # the shape of another tensor, which is right if that is
    sizes: Any = node.args[1] if packed else node.args[1:]
    shape = recorder.values[node]
    new = [
        int(stays[d].sum()) if isinstance(s, int) and s > 0 and stays[d] is not None else s  # type: ignore[union-attr]
        for d, s in enumerate(twin.args[1] if packed else twin.args[1:])  # type: ignore[arg-type]
    ]
    if len(sizes) != len(shape):
        raise VerificationError(f"the sizes of {node.name} cannot be rewritten")
    twin.args = (twin.args[0], tuple(new)) if packed else (twin.args[0], *new)


def _groups(twin: fx.Node, shape: Any, before: Stays) -> None:
    """A depthwise convolution has as many groups as channels stay."""
    at = 6 if len(twin.args) > 6 else None
    groups = twin.args[at] if at else twin.kwargs.get("groups", 1)
    mask = before[1] if len(before) > 1 else None
    if groups == shape[1] and groups != 1 and mask is not None:
        if at:
            twin.args = (*twin.args[:at], int(mask.sum()), *twin.args[at + 1 :])
        else:
            twin.kwargs = {**twin.kwargs, "groups": int(mask.sum())}


def _pad(twin: fx.Node, small: Any, large: Any, after: Stays) -> None:
    rank = len(large)
    amounts = list(twin.args[1] if len(twin.args) > 1 else twin.kwargs["pad"])  # type: ignore[arg-type]
    for index in range(len(amounts) // 2):
        dim = rank - 1 - index
        mask = after[dim]
        if mask is None or large[dim] == small[dim]:
            continue
        low, high = amounts[2 * index], amounts[2 * index + 1]
        amounts[2 * index] = _kept_before(mask, low)
        amounts[2 * index + 1] = int(mask[large[dim] - high :].sum())
    if len(twin.args) > 1:
        twin.args = (twin.args[0], tuple(amounts), *twin.args[2:])
    else:
        twin.kwargs = {**twin.kwargs, "pad": tuple(amounts)}


def _slices(twin: fx.Node, index: Any, shape: Any, before: Stays) -> None:
    items = list(index) if isinstance(index, tuple) else [index]
    if any(item is Ellipsis or item is None for item in items):
        rest = len(shape) - sum(item is not None and item is not Ellipsis for item in items)
        at = items.index(Ellipsis) if Ellipsis in items else len(items)
        if None in items:
            raise VerificationError(f"the new dimensions at {twin.name} have no rewriting rule")
        items[at : at + 1] = [slice(None)] * rest
    new: list[Any] = []
    for dim, item in enumerate(items):
        mask = before[dim] if dim < len(before) else None
        new.append(item if mask is None else _slice(twin, item, mask, shape[dim]))
    twin.args = (twin.args[0], tuple(new) if isinstance(index, tuple) else new[0])


def _slice(twin: fx.Node, item: Any, mask: Tensor, size: int) -> Any:
    if isinstance(item, int) and bool(mask[item]):
        return _kept_before(mask, item % size)
    if not isinstance(item, slice) or any(
        isinstance(v, fx.Node) for v in (item.start, item.stop, item.step)
    ):
        raise VerificationError(f"the index at {twin.name} has no rewriting rule")
    start, stop, step = item.indices(size)
    if step == 1:
        return slice(_kept_before(mask, start), _kept_before(mask, stop))
    chosen = torch.zeros(size, dtype=torch.bool)
    chosen[start:stop:step] = True
    return (chosen[mask]).nonzero().flatten().tolist()


def _split(node: fx.Node, twin: fx.Node, shape: Any, parts: Any, before: Stays) -> None:
    dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
    if not isinstance(dim, int):
        raise VerificationError(f"the split at {node.name} has no rewriting rule")
    dim %= len(shape)
    mask = before[dim]
    if mask is None:
        return
    sizes, at = [], 0
    for part in parts:
        sizes.append(int(mask[at : at + part[dim]].sum()))
        at += part[dim]
    twin.target = torch.split if twin.op == "call_function" else "split"
    twin.args = (twin.args[0], sizes, dim)
    twin.kwargs = {}
