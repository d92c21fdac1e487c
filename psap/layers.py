"""The convolutions and linear layers of a model as calls that can be made again at other widths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from psap.graph import Graph
from psap.graph.calls import QuietMode
from psap.graph.rules import RULES
from psap.graph.trace import Tracer, run
from psap.untouched import untouched

aten = torch.ops.aten


@dataclass(frozen=True)
class Layer:
    """One call of a weight.

    Attributes:
        weight: name of the parameter.
        weight_shape: its shape; [out, in, ...] or, transposed, [in, out, ...].
        positions: sizes of the input but for its channels, the batch first.
        options: stride, padding, dilation, transposed, output padding and groups of a convolution;
            empty for a linear layer.
        bias: whether there is one.
        dtype: of input and weight.
        channels_last: memory format of the input.
    """

    weight: str
    weight_shape: tuple[int, ...]
    positions: tuple[int, ...]
    options: tuple[Any, ...]
    bias: bool
    dtype: torch.dtype
    channels_last: bool

    def signature(self) -> str:
        """A text that is the same for calls that take the same time."""
        parts = ["convolution" if self.options else "linear", self.weight_shape, self.positions]
        parts += [*self.options, str(self.dtype).removeprefix("torch.")]
        parts += ["bias"] * self.bias + ["channels_last"] * self.channels_last
        return " ".join(str(part).replace(" ", "") for part in parts)

    @property
    def groups(self) -> int:
        """Groups of the convolution."""
        return int(self.options[5]) if self.options else 1

    @property
    def depthwise(self) -> bool:
        """Whether the groups follow the number of filters."""
        if self.groups == 1:
            return False
        return self.weight_shape[not self.options[3]] == (self.groups if self.options[3] else 1)

    def moves(self) -> tuple[bool, bool]:
        """Whether pruning may change the first and the second dimension of the weight."""
        return True, not self.depthwise

    def knots(self, shares: Sequence[float]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Sizes of the first two dimensions of the weight at some shares; what does not move stays.

        Wide layers get multiples of 16, so that a curve shows the width and not its oddness.
        """
        found: list[tuple[int, ...]] = []
        for size, moves in zip(self.weight_shape[:2], self.moves(), strict=True):
            step = 16 if size >= 128 else 1
            if self.groups > 1 and not found:  # filters of a group come and go together
                step = size // self.groups if self.depthwise else self.groups
            sizes = {min(size, max(1, round(share * size / step)) * step) for share in shares}
            found.append(tuple(sorted(sizes)) if moves else (size,))
        return found[0], found[1]

    def call(
        self, sizes: tuple[int, int], device: torch.device
    ) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        """The call with a weight whose first dimensions have other sizes, and its inputs.

        A product with a raw parameter [in, out] is made as a linear layer of the same size.
        """

        def made(*shape: int) -> Tensor:
            return torch.rand(shape, dtype=self.dtype, device=device)

        weight = made(*sizes, *self.weight_shape[2:])
        if not self.options:
            offset = made(sizes[0]) if self.bias else None
            return (lambda x: nn.functional.linear(x, weight, offset)), (
                made(*self.positions, sizes[1]),
            )
        *before, transposed, padding, groups = self.options
        if self.depthwise:
            groups = sizes[0] * groups // self.weight_shape[0]
        wide = sizes[1] * groups
        reads, gives = (sizes[0], wide) if transposed else (wide, sizes[0])
        bias = made(gives) if self.bias else None
        x = made(self.positions[0], reads, *self.positions[1:])
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
            weight = weight.contiguous(memory_format=torch.channels_last)
        return (
            lambda x: aten.convolution(x, weight, bias, *before, transposed, padding, groups)
        ), (x,)


class _Recorder(QuietMode):
    """Notes the calls of weights while a tracer runs a model; it knows which weight is which."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer
        self.found: list[Layer] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        op = func.overloadpacket
        if op is aten.convolution:
            x, weight, bias, *options = args
            self.note(
                x, weight, bias, tuple(_plain(o) for o in options), (x.shape[0], *x.shape[2:])
            )
        elif op in (aten.mm, aten.addmm):
            x, weight = args[-2:]
            bias = args[0] if op is aten.addmm else None
            self.note(x, weight, bias, (), (x.shape[0],))
        return func(*args, **(kwargs or {}))

    def note(
        self, x: Tensor, weight: Tensor, bias: Any, options: Any, positions: tuple[int, ...]
    ) -> None:
        """Keep a call if its weight is a parameter or buffer, or is made from one of its shape."""
        view = self.tracer.view(weight)
        if view is None or view.rows or self.tracer.view(x) is not None:
            return
        if view.dims[:2] != (0, 1) and (options or view.dims != (1, 0)):
            return
        shape = (*self.tracer.shapes[view.name][:2], *weight.shape[2:])
        last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        last = last and not x.is_contiguous()
        self.found.append(
            Layer(view.name, shape, positions, options, bias is not None, x.dtype, last)
        )


def _plain(option: Any) -> Any:
    return tuple(option) if isinstance(option, (list, tuple)) else option


def layers(graph: Graph) -> list[Layer]:
    """Every call of a weight in a pass of the traced model in evaluation, in order.

    A layer whose weight is made in forward in a way that the graph does not know is not among them.
    """
    tracer = Tracer(graph.model, RULES)
    recorder = _Recorder(tracer)
    with untouched(graph.model), recorder:
        run(tracer, graph.model, graph.inputs, training=False)
    return recorder.found
