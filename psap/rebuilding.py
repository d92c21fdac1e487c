"""What a saved network says of itself: inputs, classes, the architecture it was cut from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from psap.errors import ArgumentError
from psap.graph.inputs import Inputs
from psap.inputspec import zeros
from psap.models import create
from psap.models.factory import FACTORIES
from psap.plans import Plan, fingerprint
from psap.recipe import shortened

MOST_CLASSES = 1 << 20
"""No network is guessed that has more (a guard against bombs)."""


def recorded_inputs(plan: Plan, path: Path) -> Inputs:
    """Zeros of the shapes and dtypes of the inputs that a plan was made with.

    Raises:
        ArgumentError: there are none, or one was an object that no file holds.
    """
    inputs = zeros(plan.inputs)
    if inputs is None:
        raise ArgumentError(f"{path} does not say the shapes of its inputs; pass --input 3,32,32")
    return inputs


def recorded_classes(plan: Plan) -> int | None:
    """The width of the one layer that gives the output, or None."""
    ends = {name for name, why in plan.left_alone.items() if why == "output of the model"}
    widths = {
        before.shape[0] for before, _ in plan.layers if before.weight.rpartition(".")[0] in ends
    }
    found = widths.pop() if len(widths) == 1 else 0
    return found if 0 < found <= MOST_CLASSES else None


def dense_factory(
    plan: Plan, path: Path, arch: str | None, *, num_classes: int | None, in_channels: int
) -> Callable[[], nn.Module]:
    """What builds the dense network that a plan was made for.

    Args:
        plan: the plan in the file.
        path: the file.
        arch: the name of its architecture; None looks through those of psap.
        num_classes: classes of the dense network; None takes what the plan says.
        in_channels: C of the inputs.

    Raises:
        ArgumentError: no architecture is given and none of psap's fits, or the given one does not.
        ArgumentTypeError: the given one cannot be called, or makes no module.
    """
    classes = num_classes or recorded_classes(plan) or 10
    options = {"num_classes": classes, "in_channels": in_channels}
    if arch is not None:
        if not _fits(create(arch, **options), plan):
            raise ArgumentError(
                f"{path} was not made from {arch} with {classes} classes and {in_channels} input "
                "channels: names or shapes of parameters differ; pass --arch and --num-classes of "
                "the dense network that was pruned"
            )
        return lambda: create(arch, **options)
    with torch.device("cpu" if plan.without else "meta"):
        fits = [name for name in FACTORIES if _fits(create(name, **options), plan)]
    if fits:
        return lambda: create(fits[0], **options)
    raise ArgumentError(
        f"arch is not given, and {path} was made from none of psap's own ({', '.join(FACTORIES)}) "
        f"with {classes} classes and {in_channels} input channels; pass --arch "
        "package.module:factory, which builds the dense network that was pruned"
    )


def _fits(dense: nn.Module, plan: Plan) -> bool:
    """Whether a plan was made for this network, or for what is left of it."""
    try:
        return fingerprint(shortened(dense, plan)) == plan.architecture
    except Exception:  # another network: it has no such branch, or takes other inputs
        return False
