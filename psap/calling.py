"""Classes that say how they are called, where Python would speak of their ``__init__``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, TypeVar

from psap.errors import ArgumentTypeError

Kind = TypeVar("Kind", bound=type)


def called(example: str) -> Callable[[Kind], Kind]:
    """Refuse arguments that a class does not take with an `ArgumentTypeError` that shows a call.

    Args:
        example: the right call, as it would be typed.
    """

    def decorate(kind: Kind) -> Kind:
        make: Callable[..., None] = kind.__init__  # type: ignore[misc]
        signature = inspect.signature(make)

        @functools.wraps(make)
        def checked(self: Any, *args: Any, **options: Any) -> None:
            try:
                signature.bind(self, *args, **options)
            except TypeError as error:
                meant = _meant(options, list(signature.parameters))
                raise ArgumentTypeError(
                    f"{kind.__name__}: {error}{meant}; call {example}"
                ) from None
            make(self, *args, **options)

        kind.__init__ = checked  # type: ignore[misc]
        return kind

    return decorate


def _meant(options: dict[str, Any], known: list[str]) -> str:
    unknown = next((name for name in options if name not in known), None)
    close = get_close_matches(unknown or "", known, 1)
    return f" (is {close[0]!r} meant?)" if close else ""
