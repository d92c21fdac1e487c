"""Whether a copy of a model runs itself, and nothing of the model it was made from."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from psap.errors import ArgumentError
from psap.graph.calls import QuietMode
from psap.members import all_tensors


class Foreign(QuietMode):
    """Refuses ops on parameters and buffers of one model while its copy runs.

    A function that holds a module, such as a forward() that was replaced by a lambda, is the same
    function in a copy, and calls the original. Two such copies always agree.

    Args:
        model: the model.
        copy: what runs; tensors that it shares with the model are its own.

    Raises:
        ArgumentError: an op takes a tensor of the model; in the block.
    """

    def __init__(self, model: nn.Module, copy: nn.Module) -> None:
        super().__init__()
        own = {id(tensor) for tensor in all_tensors(copy).values()}
        self._names = {id(t): n for n, t in all_tensors(model).items() if id(t) not in own}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the call, if all it takes is the copy's own."""
        for value in args:
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(tensor, Tensor) and id(tensor) in self._names:
                    raise ArgumentError(
                        f"a copy of the model still uses {self._names[id(tensor)]} of the "
                        "original, so nothing can be proven of it: something holds a module from "
                        "outside, such as a forward() that was replaced by a function over it (a "
                        "lambda, torch.compile(module.forward)). Put it back while psap works on "
                        "the model; torch.compile(model) and model.compile() need not be undone"
                    )
        return func(*args, **(kwargs or {}))
