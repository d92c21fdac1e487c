"""What of a model must not change while a pruner works on it: its parameters, shapes and dtypes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from psap.errors import StateError


def require_same(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    kinds: Mapping[str, torch.dtype],
) -> None:
    """Check that a model is the one that a pruner was made for.

    Args:
        model: the model as it is now.
        parameters: all of its parameters as they were, by name.
        shapes: the shape of every parameter and buffer.
        kinds: dtypes of the rows that are saved of parameters and buffers.

    Raises:
        StateError: a parameter or buffer is gone or another one, or has another shape or dtype.
    """
    now: dict[str, Tensor] = dict(model.named_parameters())
    other = [name for name, known in parameters.items() if now.get(name) is not known]
    if other:
        is_what = "is another tensor" if other[0] in now else "is gone"
        raise StateError(
            f"{other[0]} {is_what} since the Pruner was made{_more(other)}: the optimizer and "
            "psap hold the old one, so it would not be trained or pruned. While pruning, replace "
            "no module or parameter, and load weights with load_state_dict(..., assign=False); or "
            "make a new optimizer and a new Pruner for the model as it is now"
        )
    now |= dict(model.named_buffers())
    cut = [name for name, shape in shapes.items() if name in now and now[name].shape != shape]
    if cut:
        raise StateError(
            f"{cut[0]} had shape {tuple(shapes[cut[0]])} and has {tuple(now[cut[0]].shape)} now"
            f"{_more(cut)}; change no shapes while pruning, or make a new Pruner for the model"
        )
    gone = [name for name in kinds if name not in now]
    if gone:
        raise StateError(f"the buffer {gone[0]} is gone; put it back, or make a new Pruner")
    cast = [name for name, dtype in kinds.items() if now[name].dtype != dtype]
    if cast:
        name, before = cast[0], kinds[cast[0]]
        raise StateError(
            f"{name} was {before} when its channels were pruned and is {now[name].dtype} now"
            f"{_more(cast)}, which what psap saved of it does not fit. Go back with "
            f"model.to({before}); convert a model before its Pruner is made, or after finish(), "
            "and train in lower precision with torch.autocast"
        )


def _more(names: Sequence[str]) -> str:
    count = len(names) - 1
    return f" (and so for {count} more)" if count else ""
