"""Functions and classes that say how they are called, where Python would speak of positions."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, TypeVar

from psap.errors import ArgumentTypeError

Kind = TypeVar("Kind", bound=Callable[..., Any])


def called(example: str) -> Callable[[Kind], Kind]:
    """Refuse arguments that are not taken with an `ArgumentTypeError` that shows a call.

    Args:
        example: the right call of the function or class, as it would be typed.
    """

    def decorate(kind: Kind) -> Kind:
        if not isinstance(kind, type):
            return _checking(kind, kind.__name__, example)  # type: ignore[no-any-return]
        kind.__init__ = _checking(kind.__init__, kind.__name__, example)  # type: ignore[misc]
        return kind

    return decorate


def _checking(call: Callable[..., Any], name: str, example: str) -> Any:
    signature = inspect.signature(call)

    @functools.wraps(call)
    def checked(*args: Any, **options: Any) -> Any:
        try:
            signature.bind(*args, **options)
        except TypeError as error:
            meant = _meant(options, list(signature.parameters))
            raise ArgumentTypeError(f"{name}: {error}{meant}; call {example}") from None
        return call(*args, **options)

    return checked


def _meant(options: dict[str, Any], known: list[str]) -> str:
    unknown = next((name for name in options if name not in known), None)
    close = get_close_matches(unknown or "", known, 1)
    return f" (is {close[0]!r} meant?)" if close else ""
