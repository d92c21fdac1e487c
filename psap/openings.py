"""Which modules graph mode must look into: those whose forward() calls with fixed sizes.

Everything else stays a call of the user's own module, with its smaller tensors. So control flow in
forward(), or what it does in train mode only, is no obstacle as long as it counts no channels.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from psap.errors import TraceError
from psap.graph.groups import doubled
from psap.graph.labels import Ints, plain
from psap.graph.rules import RULES
from psap.graph.trace import Tracer, run
from psap.graph.untouched import untouched

COUNTING = frozenset({
    "view", "reshape", "unflatten", "expand", "pad", "_pad", "__getitem__", "split",
    "split_with_sizes", "chunk", "tensor_split", "narrow", "repeat", "select", "index_select",
})  # fmt: skip
"""Names of calls whose arguments may count channels."""


class _Calls(TorchFunctionMode):
    """Notes where such calls happen, and which labels they touch."""

    def __init__(self, tracer: Tracer, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._tracer = tracer
        self.found: list[tuple[tuple[str, ...], Tensor]] = []
        self.read: list[tuple[tuple[str, ...], Tensor]] = []
        self.views: list[tuple[tuple[str, ...], str]] = []
        self.sized: set[tuple[str, ...]] = set()

    def _own_groups(self) -> bool:
        """Whether forward() itself says in how many groups it convolves."""
        where = self._tracer.where()
        return not where or not isinstance(
            self._model.get_submodule(where[-1]), nn.modules.conv._ConvNd
        )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the call and note the labels of its first argument and of its results."""
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in COUNTING or (name.startswith("conv") and self._own_groups()):
            where = self._tracer.where()
            if name in ("view", "reshape", "expand"):
                self.sized.add(where)
            for tensor in tree_leaves((args[:1], out)):
                labels = self._tracer.get(tensor)
                if labels is not None:
                    self.found.append((where, plain(labels)))
                elif (view := self._tracer.view(tensor)) is not None:
                    self.views.append((where, view.name))
        elif name in ("__get__", "size") and (labels := self._tracer.get(args[0])) is not None:
            self.read.append((self._tracer.where(), plain(labels)))
        return out


def openings(
    model: nn.Module, inputs: tuple[Any, ...], alive: Callable[[Tracer], Ints]
) -> dict[str, dict[str, Any]]:
    """The modules in whose own forward() a call with sizes meets a channel that goes.

    Args:
        model: the dense model; it is not changed.
        inputs: inputs of the model's dtype.
        alive: for a finished trace 1 for every label whose channel stays, else 0.

    Returns:
        For the name of each module the arguments that it was called with and that are no tensors;
        the model itself if there is no such module.
    """
    opened: dict[str, dict[str, Any]] = {}
    missed = set(dict(model.named_parameters()))
    for training in (False, True):
        if training and not missed:
            break  # no head of train mode alone; what else differs there is for the proof to find
        for batch in (inputs, doubled(inputs)):
            tracer = Tracer(model, RULES)
            found = None if batch is None else _found(model, batch, training, alive, tracer)
            if found is not None:
                opened = {**found, **opened}
                missed -= tracer.reached
                break
    return opened or {"": {}}


def _found(
    model: nn.Module,
    inputs: tuple[Any, ...],
    training: bool,
    alive: Callable[[Tracer], Ints],
    tracer: Tracer,
) -> dict[str, dict[str, Any]] | None:
    """The same for one mode, or None if the dense network cannot run in it."""
    calls = _Calls(tracer, model)
    with untouched(model), _arguments(model) as given:
        try:
            with calls:
                run(tracer, model, inputs, training)
        except TraceError:
            return None
    stays = torch.from_numpy(alive(tracer))
    # A size that is read off a tensor which shrinks may be that of another one which does not.
    calls.found += [(where, labels) for where, labels in calls.read if where in calls.sized]
    calls.found += tracer.counted
    for where, name in calls.views:
        sides = [labels for (owner, _), labels in tracer.along.items() if owner == name]
        calls.found += [(where, plain(labels)) for labels in sides]
    names = {where[-1] for where, labels in calls.found if not bool(stays[labels].all())}
    return {name: given.get(name, {}) for name in sorted(names)}


@contextmanager
def _arguments(model: nn.Module) -> Iterator[dict[str, dict[str, Any]]]:
    """Arguments of the first call of every module that are None, switches or names."""
    given: dict[str, dict[str, Any]] = {}
    handles = []
    try:
        for name, module in model.named_modules():

            def note(m: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                bound = inspect.signature(m.forward).bind(*args, **kwargs)
                bound.apply_defaults()
                given.setdefault(
                    name,
                    {
                        k: v
                        for k, v in bound.arguments.items()
                        if v is None or type(v) in (bool, str)
                    },
                )

            handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
        yield given
    finally:
        for handle in handles:
            handle.remove()
