"""Activation functions that are nowhere flat: what differs before one also differs behind it.

A ReLU that is closed for all inputs hides whatever was computed wrongly before it; one that is
always open hides whether it is there at all. What surgery does to channels does not depend on which
function runs on them, as long as it makes the same of zero. So a proof may give every function
a slope: f(x) + x / 4, or f(x) + softsign(x) / 4 where f is bounded, so that gates do not grow. That
is every op with a flat part that the channel graph has a rule for; others freeze their channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from psap.graph.calls import QuietMode

UNBOUNDED = (
    "elu", "celu", "selu", "silu", "gelu", "mish", "hardswish", "leaky_relu", "_prelu_kernel",
    "hardshrink", "softshrink", "abs", "round", "floor", "ceil", "trunc",
)  # fmt: skip
BOUNDED = (
    "hardtanh", "relu6", "hardsigmoid", "tanh", "erf", "sign", "clamp", "clamp_min", "clamp_max",
)  # fmt: skip


class Sloping(QuietMode):
    """Adds the slope to the results of activation functions while it is active."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the call; add a slope if it is an activation function of floating numbers."""
        sloped = _SLOPED.get(str(func.overloadpacket)) if args else None
        if sloped is None or not args[0].is_floating_point():
            return func(*args, **(kwargs or {}))
        return sloped(func, args, kwargs or {})


def _relu(func: Any, args: Any, _: Any) -> Tensor:
    """relu(x) + x / 4."""
    leaky = F.leaky_relu_ if func._schema.is_mutable else F.leaky_relu
    return leaky(args[0], 0.2).mul_(1.25)


def _unbounded(func: Any, args: Any, kwargs: Any) -> Any:
    slope = args[0] / 4  # before the call, which may change it
    return func(*args, **kwargs).add_(slope)


def _bounded(func: Any, args: Any, kwargs: Any) -> Any:
    slope = args[0].abs().add_(1)
    torch.div(args[0], slope, out=slope)
    out = func(*args, **kwargs)
    return out.add_(slope, alpha=0.25) if out.shape == slope.shape else out  # as bounds may be


def _either(func: Any, args: Any, kwargs: Any) -> Any:
    """The larger or smaller of two, and a quarter of both."""
    return func(*args, **kwargs).add_(args[0] / 4).add_(args[1] / 4)


_SLOPED = {
    f"aten.{name}{ending}": sloped
    for names, sloped in (
        (("relu",), _relu),
        (UNBOUNDED, _unbounded),
        (BOUNDED, _bounded),
        (("maximum", "minimum"), _either),
    )
    for name in names
    for ending in ("", "_")
}
