"""The channel graph: which channels of a model live and die together."""

from psap.graph.groups import MAKES, Graph, Group, Side, trace

__all__ = ["MAKES", "Graph", "Group", "Side", "trace"]
