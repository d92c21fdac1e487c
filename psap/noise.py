"""Random numbers that do not depend on how many of them forward() draws.

A layer that adds noise to its channels draws fewer numbers in the small network, and others from
there on, although both networks do the same. While `EvenNoise` is active, all of them are one
number, so that the networks can be compared.
"""

from __future__ import annotations

from typing import Any

from psap.graph.calls import QuietMode

NUMBER = 0.37
"""What is drawn: a number that is not special to any op."""


class EvenNoise(QuietMode):
    """Makes calls that draw random numbers draw the same one everywhere.

    Args:
        mean: draw the mean, so that noise which is added changes nothing. That is for train mode,
            where it is left out like dropout; else no number is drawn that is special to any op.

    Attributes:
        changed: whether it has changed a call.
    """

    def __init__(self, *, mean: bool) -> None:
        super().__init__()
        self.changed, self._mean = False, mean
        self._normal, self._uniform = (0.0, 0.5) if mean else (NUMBER, NUMBER)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the call, and replace what it has drawn."""
        name = func.overloadpacket.__name__
        if name not in _NORMAL and name not in _UNIFORM and name not in _COINS:
            return func(*args, **(kwargs or {}))
        names = [argument.name for argument in func._schema.arguments]
        given: dict[str, Any] = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
        out = func(*args, **(kwargs or {}))
        self.changed = True
        if name in _COINS:
            chance = given.get("p", 0.5) if name == "bernoulli_" else given["self"]
            return out.zero_().add_(chance) if self._mean else out.fill_(1)
        if name in _NORMAL:
            return out.zero_().add_(given.get("mean", 0.0) + given.get("std", 1.0) * self._normal)
        low = given.get("from", 0.0)
        return out.zero_().add_(low + (given.get("to", 1.0) - low) * self._uniform)


_NORMAL = ("randn", "randn_like", "normal_", "normal")
_UNIFORM = ("rand", "rand_like", "uniform_")
_COINS = ("bernoulli", "bernoulli_")
