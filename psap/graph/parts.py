"""Which channels of its layer a group is: all of them, or a part, such as one side of a split."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from psap.graph.groups import MAKES, Graph, Group

SHOWN = 3
"""Ranges of channels that the name of a part spells out."""


def part(graph: Graph, group: Group) -> str:
    """What a group is of the layer that it is named after; "" if it is all of its channels.

    For example "channels 4-11 of 16", or "channels 0-15 of 16, each 4 of them" where a channel of
    the group stands for several of the layer (groups of a convolution, heads of attention).
    """
    name = group.producers[0]
    side = next(s for s in group.sides if s[0] == name and graph.roles[s] in MAKES)
    channels, each = graph.channels[side], group.sides[side]
    if each == 1 and channels.size == group.size:
        return ""
    inside = (channels >= group.start) & (channels < group.start + group.size)
    runs = packed(np.flatnonzero(inside).tolist()).split(",")
    shown = ",".join(runs[:SHOWN]) + (",..." if len(runs) > SHOWN else "")
    several = f", each {each} of them" if each > 1 else ""
    return f"channels {shown} of {channels.size}{several}"


def packed(indices: Sequence[int]) -> str:
    """Ascending indices as ranges, such as "0-3,7"."""
    runs: list[list[int]] = []
    for i in indices:
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return ",".join(f"{a}-{b}" if b > a else f"{a}" for a, b in runs)
