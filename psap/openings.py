"""Which modules graph mode must look into: those whose forward() calls with fixed sizes.

Everything else stays a call of the user's own module, with its smaller tensors. So control flow in
forward(), or what it does in train mode only, is no obstacle as long as it counts no channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from psap.errors import TraceError
from psap.graph.groups import doubled
from psap.graph.labels import Ints, plain
from psap.graph.rules import RULES
from psap.graph.trace import Tracer, run, untouched

COUNTING = frozenset({
    "view", "reshape", "flatten", "unflatten", "expand", "pad", "_pad", "__getitem__", "split",
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
            for tensor in tree_leaves((args[:1], out)):
                labels = self._tracer.get(tensor)
                if labels is not None:
                    self.found.append((where, plain(labels)))
        return out


def openings(
    model: nn.Module, inputs: tuple[Any, ...], alive: Callable[[Tracer], Ints]
) -> frozenset[str]:
    """Names of the modules in which a call with sizes meets a channel that goes.

    Args:
        model: the dense model; it is not changed.
        inputs: inputs of the model's dtype.
        alive: for a finished trace 1 for every label whose channel stays, else 0.
    """
    opened: set[str] = set()
    for training in (False, True):
        tracer = Tracer(model, RULES)
        calls = _Calls(tracer, model)
        with untouched(model):
            try:
                with calls:
                    run(tracer, model, inputs, training)
            except TraceError:
                twice = doubled(inputs)
                if not training or twice is None:
                    continue  # a mode that the dense network cannot run in
                tracer = Tracer(model, RULES)
                calls = _Calls(tracer, model)
                try:
                    with calls:
                        run(tracer, model, twice, training)
                except TraceError:
                    continue
        stays = torch.from_numpy(alive(tracer))
        for where, labels in calls.found:
            if not bool(stays[labels].all()):
                opened.update(where)
    return frozenset(opened)
