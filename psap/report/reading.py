"""Checks the values of a report record; every error says which key is broken.

All raise `ArgumentError` but `number` and `whole`, which give None.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from psap.errors import ArgumentError


def number(value: object) -> float | None:
    """The value as a finite float, or None; what no run can measure (1e100) is None as well."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        result = float(value)
    except OverflowError:
        return None
    return result if math.isfinite(result) and abs(result) < 1e100 else None


def whole(value: object) -> int | None:
    """The value as an int, or None if it is not an integer."""
    result = number(value)
    return None if result is None or result != int(result) else int(result)


def broken(where: str, found: object, wanted: str) -> ArgumentError:
    """The error for a value that is not what it should be."""
    shown = f"{type(found).__name__} {found!r}"
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return ArgumentError(f"broken report record: {where} is {shown}, wanted {wanted}")


def mapping(value: object, where: str) -> Mapping[str, Any]:
    """The value, if it is an object of JSON."""
    if not isinstance(value, Mapping):
        raise broken(where, value, "an object")
    return value


def sequence(value: object, where: str) -> Sequence[Any]:
    """The value, if it is a list of JSON."""
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise broken(where, value, "a list")
    return value


def string(value: object, where: str) -> str:
    """The value, if it is a string."""
    if not isinstance(value, str):
        raise broken(where, value, "a string")
    return value


def integer(value: object, where: str, low: int = 0) -> int:
    """The value as an int, at least ``low``."""
    result = whole(value)
    if result is None or result < low:
        raise broken(where, value, f"an integer >= {low}")
    return result


def need(entry: Mapping[str, Any], key: str, where: str) -> Any:
    """The value of a key that must be there."""
    if key not in entry:
        raise ArgumentError(f"broken report record: {where} lacks the key {key!r}")
    return entry[key]


def optional(record: Mapping[str, Any], key: str, empty: Any) -> Any:
    """The value of a key; ``empty`` if it is missing or null."""
    value = record.get(key)
    return empty if value is None else value


def entries(record: Mapping[str, Any], key: str) -> list[tuple[str, Mapping[str, Any]]]:
    """The objects of a list that may be missing, each with the name of its place."""
    found = []
    for i, entry in enumerate(sequence(optional(record, key, ()), key)):
        found.append((f"{key}[{i}]", mapping(entry, f"{key}[{i}]")))
    return found


def indices(value: object, where: str, size: int | None = None) -> frozenset[int]:
    """The whole numbers of a list, each below ``size``."""
    found = frozenset(integer(i, f"an index in {where}") for i in sequence(value, where))
    if size is not None and found and max(found) >= size:
        raise broken(f"an index in {where}", max(found), f"an integer < {size}")
    return found


def per_group(entry: Mapping[str, Any], key: str, where: str) -> dict[str, float | None]:
    """Numbers by the name of a group."""
    values = mapping(optional(entry, key, {}), f"{where}.{key}")
    return {str(name): number(value) for name, value in values.items()}


def per_group_indices(entry: Mapping[str, Any], key: str, where: str) -> dict[str, frozenset[int]]:
    """Indices by the name of a group."""
    values = mapping(optional(entry, key, {}), f"{where}.{key}")
    return {str(name): indices(value, f"{where}.{key}") for name, value in values.items()}
