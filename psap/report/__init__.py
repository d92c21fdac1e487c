"""The report of a pruning run: one self-contained HTML page, drawn from a JSON record."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from psap.files import atomic_write
from psap.report.fates import tally
from psap.report.page import build
from psap.report.record import FORMAT, VERSION, read

__all__ = ["FORMAT", "VERSION", "fates", "render", "write"]


def render(record: Mapping[str, Any]) -> str:
    """The page as HTML; the same record gives the same bytes.

    Args:
        record: values of JSON: ``format`` and ``version`` (`FORMAT`, `VERSION`), ``groups`` and
            ``layers``; all else may be missing, and numbers may be None or NaN.

    Raises:
        ArgumentError: the record is of another format or version, or broken.
    """
    return build(read(record))


def fates(record: Mapping[str, Any]) -> dict[str, int]:
    """How many channels were pruned, watched and came back, and how many of those stayed.

    Raises:
        ArgumentError: the record is of another format or version, or broken.
    """
    found = read(record)
    return tally(found.groups, found.steps, found.windows)


def write(record: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Writes the page to ``path``: completely, or not at all (an older file then survives).

    Raises:
        ArgumentError: the record is of another format or version, or broken.
        FileError: the file cannot be written.
    """
    atomic_write(path, render(record))
    return Path(path)
