"""The machine of a run: its device, its CPU threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from psap.errors import ArgumentError


def device(name: str) -> torch.device:
    """A device by name.

    Raises:
        ArgumentError: it cannot be used here.
    """
    try:
        found = torch.device(name)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ArgumentError(f"device is {name!r}, which cannot be used: {reason}") from error
    return found


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """This many threads; then as many as before. None leaves the number."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
