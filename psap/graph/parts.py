"""Which channels of its layer a group is: all of them, or a part, such as one side of a split."""

from __future__ import annotations

import numpy as np

from psap.graph.alike import SHOWN, packed
from psap.graph.groups import MAKES, Graph, Group


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
    several = f", each {each} of them" if each > 1 else ""
    return f"channels {packed(np.flatnonzero(inside).tolist(), SHOWN)} of {channels.size}{several}"
