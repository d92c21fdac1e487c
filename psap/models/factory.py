"""Models by name, or by the place of a factory in the user's own code."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import nn

from psap.errors import ArgumentError, ArgumentTypeError
from psap.models.digits import digits_resnet
from psap.models.mobilenet import mobilenet_v2
from psap.models.resnet import resnet20, resnet32, resnet44, resnet56
from psap.models.vgg import vgg16_bn

Factory = Callable[..., Any]

FACTORIES: dict[str, Factory] = {
    factory.__name__: factory
    for factory in (
        *(digits_resnet, resnet20, resnet32, resnet44, resnet56),
        *(vgg16_bn, mobilenet_v2),
    )
}


def create(name: str, *, num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Make a model with fresh weights.

    Args:
        name: a built-in name such as "resnet20", or ``package.module:factory``, where the factory
            is a callable that returns a module. Of the two options it is given those that are
            among its parameters; ``**kwargs`` counts as taking ``num_classes``.
        num_classes: width of the last layer.
        in_channels: C of the inputs [N, C, H, W].

    Raises:
        ArgumentError: the name is unknown, or there is no such module or factory.
        ArgumentTypeError: the factory is not callable, does not take these options, or returns
            something else than a module.
    """
    if num_classes < 1 or in_channels < 1:
        raise ArgumentError(
            f"num_classes is {num_classes}, in_channels is {in_channels}; pass whole numbers >= 1"
        )
    factory = FACTORIES[name] if name in FACTORIES else _find(name)
    options = _accepted(factory, num_classes=num_classes, in_channels=in_channels)
    try:
        model = factory(**options)
    except TypeError as error:
        raise ArgumentTypeError(f"{name} cannot be called with {options}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(
            f"{name} returned a {type(model).__name__}; it must return a torch.nn.Module"
        )
    return model


def _find(name: str) -> Factory:
    place, _, attribute = name.partition(":")
    if not (place and attribute):
        raise ArgumentError(
            f"model is {name!r}; pass one of {', '.join(FACTORIES)}, or package.module:factory"
        )
    try:
        found: Any = import_module(place)
    except ImportError as error:
        raise ArgumentError(
            f"model is {name!r}, and {place} cannot be imported: {error}"
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ArgumentError(f"model is {name!r}; {place} has no {attribute}")
        found = getattr(found, part)
    if not callable(found):
        raise ArgumentTypeError(
            f"{name} is a {type(found).__name__}; pass a callable that returns a torch.nn.Module"
        )
    return found  # type: ignore[no-any-return]


def _accepted(factory: Factory, **options: int) -> dict[str, int]:
    try:
        parameters = inspect.signature(factory).parameters
    except ValueError:  # some callables written in C have no signature
        return {}
    names = {name for name, item in parameters.items() if item.kind is not item.POSITIONAL_ONLY}
    if any(item.kind is item.VAR_KEYWORD for item in parameters.values()):
        names.add("num_classes")
    return {name: value for name, value in options.items() if name in names}
