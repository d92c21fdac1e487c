"""Gathers channels that occur in the same places into groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from psap.graph.labels import Ints

NDArrayBool = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True)
class _Places:
    """Which component occurs how often in which vector; sorted by vector, then by component."""

    vector: Ints
    component: Ints
    count: Ints

    @staticmethod
    def of(vectors: list[Ints], components: int) -> _Places:
        sizes = [found.size for found in vectors]
        flat = np.concatenate([*vectors, np.empty(0, dtype=np.int64)])
        keys = np.repeat(np.arange(len(sizes)), sizes) * max(1, components) + flat
        unique, count = runs(keys)
        return _Places(unique // max(1, components), unique % max(1, components), count)


def runs(keys: Ints) -> tuple[Ints, Ints]:
    """Distinct values, ascending, and how often each occurs; quick if they are nearly sorted."""
    keys = np.sort(keys, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])[: keys.size])
    return keys[starts], np.diff(np.append(starts, keys.size))


def gather(vectors: list[Ints], alive: NDArrayBool) -> tuple[Ints, list[int], list[dict[int, int]]]:
    """Gather components that occur in the same places; number their channels group after group.

    Returns:
        For every component its channel or -1, the number of channels of every group, and how often
        one of them occurs in each vector.
    """
    places = _Places.of(vectors, alive.size)
    signature = np.zeros(alive.size, dtype=np.uint64)
    np.add.at(signature, places.component, _mix(places.vector, places.count))
    chosen = np.flatnonzero(alive)
    chosen = chosen[np.argsort(_first(places, alive.size)[chosen], kind="stable")]
    _, starts, kind, counts = np.unique(
        signature[chosen], return_index=True, return_inverse=True, return_counts=True
    )
    in_order = np.argsort(starts)
    number = np.argsort(in_order)[kind]  # of the group of each, the groups as they occur
    in_group = np.full(alive.size, -1, dtype=np.int64)
    in_group[chosen] = number
    channel = np.full(alive.size, -1, dtype=np.int64)
    channel[chosen[np.argsort(number, kind="stable")]] = np.arange(chosen.size)
    sizes = counts[in_order].tolist()
    return channel, sizes, _shared(places, in_group, sizes)


def _first(places: _Places, components: int) -> Ints:
    """Where each component occurs first, counted through all vectors."""
    first = np.full(components, places.component.size)
    np.minimum.at(first, places.component, np.arange(places.component.size))
    return first


def _mix(vector: Ints, counts: Ints) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """A fixed 64-bit hash of (vector, count), to be added over the vectors of a component."""
    with np.errstate(over="ignore"):
        x = (vector.astype(np.uint64) + np.uint64(1)) << np.uint64(32)
        x = x + counts.astype(np.uint64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: np.ndarray[Any, np.dtype[np.uint64]] = x ^ (x >> np.uint64(31))
        return mixed


def _shared(places: _Places, in_group: Ints, sizes: list[int]) -> list[dict[int, int]]:
    """For every group how often a channel of it occurs in each vector."""
    shared: list[dict[int, int]] = [{} for _ in sizes]
    number = in_group[places.component]
    inside = number >= 0
    keys = places.vector[inside] * max(1, len(sizes)) + number[inside]
    order = np.argsort(keys, kind="stable")
    pairs, often = runs(keys[order])
    totals = np.add.reduceat(places.count[inside][order], np.cumsum(often) - often)
    for pair, total in zip(pairs.tolist(), totals.tolist(), strict=True):
        vector, group = divmod(pair, len(sizes))
        shared[group][vector] = total // sizes[group]
    return shared


SHOWN = 3
"""Ranges of channels that the name of a part of a layer spells out."""


def packed(indices: Sequence[int], most: int | None = None) -> str:
    """Ascending indices as ranges, such as "0-3,7"; behind ``most`` of them stand dots."""
    found: list[list[int]] = []
    for i in indices:
        if found and i == found[-1][1] + 1:
            found[-1][1] = i
        else:
            found.append([i, i])
    ranges = [f"{a}-{b}" if b > a else f"{a}" for a, b in found]
    if most is not None and len(ranges) > most:
        ranges[most:] = ["..."]
    return ",".join(ranges)
