"""Run a model once and let channel labels take the way that the data takes.

A `TorchDispatchMode` sees every ATen call of the forward pass. For each of them one rule of
`psap.graph.rules` says what happens to labels. A call without a rule freezes what it touches.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from psap.errors import TraceError
from psap.graph import calls
from psap.graph.attending import Attending
from psap.graph.calls import QuietMode, Schema, TensorMap, bind, schema, tensors_in
from psap.graph.counting import Sizes, Watch
from psap.graph.inputs import Inputs, forward, wanted
from psap.graph.labels import TAINT, Labels, compact, plain, tainting
from psap.graph.outputs import output_tensors as output_tensors
from psap.graph.skipping import skipping
from psap.members import named_modules, named_tensors, set_training

Args = dict[str, Any]
Rule = Callable[["Tracer", Args, Any], None]


@dataclasses.dataclass(frozen=True)
class Call:
    """One use of a weight by a convolution or a matrix product.

    Attributes:
        weight: name of the parameter.
        positions: output positions per weight element, summed over the batch; the call costs
            ``positions * weight.numel()`` MACs.
        outputs: elements that it gives out, for the whole batch.
    """

    weight: str
    positions: float
    outputs: float


@dataclasses.dataclass(frozen=True)
class View:
    """A tensor that is a parameter or buffer with its dimensions permuted.

    Attributes:
        name: canonical name in ``named_parameters`` / ``named_buffers``.
        dims: for every dimension of the tensor, the dimension of the parameter, or -1 for a new
            one of size 1, or `MERGED`.
        kind: what forward() made of it: "" nothing; "standard", filters by their mean and variance;
            "normed", filters along dimension 0 by their norms; "scaled", all of it by one number.
        rows: start and end of the rows of a matrix that it is, if it is not all of them.
    """

    name: str
    dims: tuple[int, ...]
    kind: Literal["", "standard", "normed", "scaled"] = ""
    rows: tuple[int, int] | None = None

    def role(self, dim: int, role: str) -> str:
        """The role of a dimension of the parameter, where its result has this role.

        A norm must not become zero, and counts whatever is not zero.
        """
        if self.kind == "normed" and dim == 0:
            return {"out": "state", "cut": "in"}.get(role, role)
        return "cut" if role == "in" and self.kind in ("normed", "scaled") else role


MERGED = -2
"""All dimensions of a weight but the first, in one."""


class Tracer(QuietMode):
    """What the rules read and write while the model runs.

    Args:
        model: the model.
        rules: the table of rules.
        gated: prune only channels that zero filters, biases and affine pairs silence, and only
            where every module can stay what it is.
    """

    def __init__(self, model: nn.Module, rules: Mapping[Any, Rule], *, gated: bool = False) -> None:
        super().__init__()
        self.gated = gated
        self.counted: list[Tensor] = []
        self.sizes = Sizes()
        self.labels = Labels()
        self.single: Tensor | None = None  # the label of the input side of all depthwise filters
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.along: dict[tuple[str, int], Tensor] = {}
        self.roles: dict[tuple[str, int], str] = {}
        self.calls: list[Call] = []
        self.fixed_macs = 0.0
        self.products: list[tuple[Tensor, float]] = []
        self.attending = Attending()
        self.attention: Literal["", "implicit", "known", "fixed"] = ""  # the one that runs
        self.normalised: dict[str, set[str]] = {}
        self.affine: set[str] = set()
        self.reached: set[str] = set()
        self.unknown: Counter[str] = Counter()
        self.counting = self.computing = True
        self.closed = False
        self._rules = rules
        self._views: TensorMap[View] = TensorMap()
        self._activations: TensorMap[Tensor] = TensorMap()
        self._narrow: TensorMap[bool] = TensorMap()  # labels that are compact
        self._origin: TensorMap[str] = TensorMap()
        self._taints: dict[int, str] = {}
        self._tainting: list[tuple[Tensor, str]] = []
        self._claimed: set[str] = set()
        held = named_modules(model)
        self._names = {id(module): name for name, module in held}
        self.parameters, self.buffers = named_tensors(model, held)
        for name, tensor in (*self.parameters.items(), *self.buffers.items()):
            self._views[tensor] = View(name, tuple(range(tensor.dim())))
            self.shapes[name] = tuple(tensor.shape)

    # Tensors of the model

    def view(self, tensor: Any) -> View | None:
        """The parameter or buffer that a tensor is, if it is one."""
        return self._views.get(tensor) if isinstance(tensor, Tensor) else None

    def set_view(self, tensor: Tensor, view: View) -> None:
        """Note that a tensor is a permuted parameter."""
        self._views[tensor] = view

    def claim(self, tensor: Tensor, dim: int, role: str, like: Tensor | None = None) -> Tensor:
        """Labels along one dimension of a parameter, int64 [size].

        Args:
            tensor: a parameter, or a permuted view of one.
            dim: dimension of ``tensor``.
            role: "out" if zeros there make the channel zero, "in" if the channel is read there,
                "cut" if it is and is not zero when it is pruned.
            like: labels without taint, as many as positions, that the caller unites the result
                with: a side without labels takes these, so that most channels have only one.
        """
        view = self._views.get(tensor)
        if view is None:
            raise KeyError("only parameters have sides")
        self._claimed.add(view.name)
        if view.dims[dim] < 0:
            fixed = self.labels.new(tensor.shape[dim])
            self.labels.freeze(fixed, f"{view.name} has no such dimension")
            return fixed
        at = view.dims[dim]
        if view.rows and at == 0:
            return self.side(view.name, at, view.role(at, role))[slice(*view.rows)]
        return self.side(view.name, at, view.role(at, role), like)

    def side(self, name: str, dim: int, role: str, like: Tensor | None = None) -> Tensor:
        """Labels along one dimension of a parameter, by its name, int64 [size]."""
        key = (name, dim)
        labels = self.along.get(key)
        if labels is None:
            size = self.shapes[name][dim]
            if like is None or like.numel() != size:
                labels = self.labels.new(size)
            else:
                labels = like if like.dim() == 1 else like.reshape(-1)
            self.along[key] = labels
            self.roles[key] = role
        elif {role, self.roles[key]} == {"in", "cut"}:
            self.roles[key] = "cut"
        elif self.roles[key] != role:
            self.labels.freeze(labels, f"{name} is read and written along one side")
        return labels

    def freeze_parameter(self, view: View, reason: str) -> None:
        """Forbid every pruning of a parameter."""
        for dim, size in enumerate(self.shapes[view.name]):
            key = (view.name, dim)
            if key not in self.along:
                self.along[key] = self.labels.new(size)
                self.roles[key] = "out"
            self.labels.freeze(self.along[key], reason)

    # Labels of activations

    def get(self, tensor: Any) -> Tensor | None:
        """Compact labels of an activation, or None where no channel is known."""
        return self._activations.get(tensor) if isinstance(tensor, Tensor) else None

    def set(self, tensor: Tensor, labels: Tensor) -> None:
        """Give an activation its labels, which broadcast to its shape."""
        if labels.dim() != tensor.dim():
            labels = labels.expand(tensor.shape)
        if labels not in self._narrow:
            labels = compact(labels)
            self._narrow[labels] = True
        self._activations[tensor] = labels

    def full(self, tensor: Tensor) -> Tensor | None:
        """Labels of an activation in its own shape."""
        labels = self.get(tensor)
        return None if labels is None else labels.expand(tensor.shape)

    def freeze(self, labels: Tensor, why: str) -> None:
        """Forbid that these channels are pruned, and say where it was found."""
        inner = self.inside()
        self.labels.freeze(labels, f"{why} (in {inner})" if inner else why)

    def taint(self, labels: Tensor, why: str) -> Tensor:
        """Mark that the values would not be zero if the channels were pruned."""
        self._tainting.append((labels, why))
        return labels | TAINT

    def _tainted_by(self, label: int) -> str:
        """What a label was first tainted by."""
        for labels, why in self._tainting:
            for known in plain(compact(labels)).reshape(-1).tolist():
                self._taints.setdefault(known, why)
        self._tainting.clear()
        return self._taints.get(label, "a constant")

    def settle(self, labels: Tensor) -> None:
        """Freeze those labels that arrive tainted where zeros are needed."""
        if tainting(labels):
            bad = plain(labels[labels >= TAINT])
            why = self._tainted_by(int(bad.reshape(-1)[0]))
            self.freeze(bad, f"a pruned channel would not stay zero after {why}")

    def reading(self, labels: Tensor) -> str:
        """The role of a side of a weight that reads these labels.

        What does not stay zero is silent all the same if its readers have zeros there ("cut").
        """
        if not tainting(labels):
            return "in"
        if not self.gated:
            return "cut"
        self.settle(labels)
        return "in"

    def count_channels(self, labels: Tensor) -> None:
        """Note that the module that runs divides by the number of these channels."""
        self.counted.append(plain(labels))
        call = self.innermost()
        if call is not None:
            name = self.name_of(call["self"])
            self.sizes.touched(name, labels)
            self.sizes.called(self, call)

    # Who made what

    def made_by(self, tensor: Tensor, weight: str) -> None:
        """Note the convolution that a tensor comes straight from."""
        self._origin[tensor] = weight

    def origin(self, tensor: Tensor) -> str | None:
        """The weight of the convolution that a tensor comes straight from."""
        return self._origin.get(tensor)

    def count(self, weight: str, positions: float, outputs: float) -> None:
        """Count what one call costs; those of train mode alone cost nothing."""
        self.calls.append(
            Call(weight, positions, outputs) if self.counting else Call(weight, 0.0, 0.0)
        )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the call, then let its rule move the labels."""
        kwargs = kwargs or {}
        found = schema(func)
        tensors = tensors_in((*args, *kwargs.values()) if kwargs else args)
        given = self._as_it_is(args) if found.turning else args
        out = func(*args, **kwargs) if self.computing else skipping(func, args, kwargs)
        views = self._views.all(tensors)
        before = self._activations.all(tensors)
        if not views and not before:
            return out
        like = found.packet in self._rules and self.get(tensors[0]) is not None
        if like or not found.shapes_only:  # or it makes a tensor in the shape of one with channels
            self._claimed, self.closed = set(), False
            self._follow(found, bind(found, given, kwargs), tensors, before, out)
            for view in views:
                self.reached.add(view.name)
                if view.name not in self._claimed:
                    self.freeze_parameter(view, calls.why_whole(view.name, found))
        return out

    def _as_it_is(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Arguments with a view in place of the first, which the call gives another shape."""
        alias = args[0].view_as(args[0])
        if (labels := self.get(args[0])) is not None:
            self.set(alias, labels)
        return (alias, *args[1:])

    def _follow(
        self, found: Schema, bound: Args, tensors: list[Tensor], before: list[Tensor], out: Any
    ) -> None:
        """Apply the rule, then freeze the channels that it did not account for."""
        rule = self._rules.get(found.packet)
        if rule is not None:
            rule(self, bound, out)
        elif before:
            self.unknown[found.name] += 1
        if not before:
            return
        followed = self.closed or any(self.get(t) is not None for t in tensors_in((out,)))
        if rule is None or not followed or self._writes_through(found, rule, tensors):
            for labels in before:
                self.freeze(labels, calls.why_lost(found, known=rule is not None))

    def _writes_through(self, found: Schema, rule: Rule, tensors: list[Tensor]) -> bool:
        """Whether a call changes a part of another tensor in a way that may leave no zero there."""
        target = tensors[0]
        labels = self.get(target)
        if not found.mutable or found.turning or not target._is_view() or labels is None:
            return False
        allowed = rule.__name__ in ("keeps_zero", "add", "mul", "clamp", "restrides")
        return not allowed or bool((labels >= TAINT).any())

    def keep_view(self, tensor: Tensor) -> None:
        """Say that a use of a parameter was understood, though it took no labels."""
        if (view := self.view(tensor)) is not None:
            self._claimed.add(view.name)

    def inside(self) -> str:
        """The innermost module that runs; "" for the model itself."""
        return self.name_of(call["self"]) if (call := self.innermost()) else ""

    def name_of(self, module: nn.Module) -> str:
        """The name of a module of the model."""
        return self._names[id(module)]

    def innermost(self) -> dict[str, Any] | None:
        """The call of the innermost module that runs: self, args and kwargs.

        It is read off the stack: hooks would cost time in every call.
        """
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code is not run.__code__:
            if frame.f_code is _CALL and id(frame.f_locals["self"]) in self._names:
                return frame.f_locals
            frame = frame.f_back
        return None


_CALL = nn.Module._call_impl.__code__
"""What runs forward() of a module, with its hooks."""


@contextmanager
def _eager() -> Iterator[None]:
    """Run compiled submodules eagerly, if there can be any."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def following(tracer: Tracer) -> Iterator[None]:
    """Let a tracer see all calls."""
    # torch.inference_mode(False) turns gradients on
    with _eager(), Watch(tracer), torch.inference_mode(False), torch.no_grad(), tracer:
        yield


def run(tracer: Tracer, model: nn.Module, inputs: Inputs, training: bool) -> None:
    """Run the model once under the tracer and freeze what comes out.

    Raises:
        TraceError: the model's forward failed, or returned no tensor.
    """
    set_training(model, training)
    try:
        with following(tracer):
            output = forward(model, inputs)
    except Exception as error:
        mode = "training" if training else "evaluation"
        raise TraceError(
            f"the model failed on the example inputs in {mode} mode: {type(error).__name__}: "
            f"{error}; {wanted(inputs)}, on the model's device"
        ) from error
    results = output_tensors(output)
    if not results:
        raise TraceError(
            f"the model returned {type(output).__name__} without any tensor in it; wrap it in a "
            "module that returns its tensors, so that what it computes can be compared"
        )
    for tensor in results:
        labels = tracer.get(tensor)
        if labels is not None:
            tracer.labels.freeze(labels, "output of the model")
