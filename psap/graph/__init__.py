"""The channel graph: which channels of a model live and die together."""

from psap.graph.groups import Graph, Group, Side, trace

__all__ = ["Graph", "Group", "Side", "trace"]
