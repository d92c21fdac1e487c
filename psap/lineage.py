"""A network that is cut while it trains: what is left of the dense one, and in whose numbers.

Masks, plans and events speak of the channels of the dense network, however often it was cut since.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from psap import plans
from psap.cost import CostModel
from psap.errors import StateError
from psap.graph import Graph
from psap.latency import LatencyTable
from psap.plans import Plan
from psap.scores import GroupStats
from psap.shrink import Result, apply, small_copy

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


def restricted(graph: Graph, alive: Bools) -> Graph:
    """The graph of what is left of a model when all channels are gone that are not alive.

    Args:
        graph: the graph before.
        alive: bool [channels].
    """
    number = np.append(np.where(alive, np.cumsum(alive) - 1, -2), -1)  # fixed positions: -1

    def renumbered(found: Ints) -> Ints:
        kept = number[found]
        left: Ints = kept[kept != -2]
        return left

    channels = {side: renumbered(found) for side, found in graph.channels.items()}
    shapes = {
        name: tuple(
            channels[name, d].size if (name, d) in channels else n for d, n in enumerate(shape)
        )
        for name, shape in graph.shapes.items()
    }
    sizes = np.bincount(graph.group_of[alive], minlength=len(graph.groups))
    starts = np.cumsum(sizes) - sizes
    groups = tuple(
        replace(group, size=int(size), start=int(start))
        for group, size, start in zip(graph.groups, sizes, starts, strict=True)
    )
    return replace(
        graph,
        channels=channels,
        shapes=shapes,
        groups=groups,
        group_of=graph.group_of[alive],
        sizes={name: renumbered(found) for name, found in graph.sizes.items()},
        entries={},
    )


class Lineage:
    """What is left of a dense network.

    Args:
        graph: the graph of the dense model.
        latency: of its layers, for targets that bound it.

    Attributes:
        dense: the same.
        cost: cost of the dense model for any widths; shares are shares of it.
        graph: the graph of the model as it is.
        original: int64 [channels], the index within its group that each channel of the model had in
            the dense one.
        gone: for every group what the removed filters and inputs counted, when they were removed.
        mode: "graph" once a cut has made programs of some modules.
    """

    def __init__(self, graph: Graph, latency: LatencyTable | None = None) -> None:
        self.dense = self.graph = graph
        self.cost = CostModel(graph, latency)
        self.gone = [
            GroupStats(np.zeros((len(group.producers), group.size)), 0, 0) for group in graph.groups
        ]
        self.mode: Literal["module", "graph"] = "module"
        self._proof: dict[str, Any] | None = None
        self.architecture = plans.fingerprint(graph.model)
        empty = np.empty(0, dtype=np.int64)
        self.original: Ints = np.concatenate([empty, *(np.arange(g.size) for g in graph.groups)])

    def kept(self, alive: Bools) -> list[Ints]:
        """For every group the dense indices of the channels that are alive."""
        spans = [slice(g.start, g.start + g.size) for g in self.graph.groups]
        return [self.original[span][alive[span]] for span in spans]

    def masks(self, alive: Bools) -> dict[str, Tensor]:
        """For every group a bool tensor [C_g] over the dense channels."""
        found = {}
        for group, kept in zip(self.dense.groups, self.kept(alive), strict=True):
            found[group.name] = torch.zeros(group.size, dtype=torch.bool)
            found[group.name][torch.from_numpy(kept)] = True
        return found

    def plan(self, alive: Bools) -> Plan:
        """From the dense network to what is alive."""
        kept = [found.tolist() for found in self.kept(alive)]
        plan = plans.from_masks(self.dense, kept, self.cost)
        return replace(plan, architecture=self.architecture, graph=None)

    def step(self, alive: Bools) -> Plan:
        """From the model as it is to what is alive."""
        spans = [slice(g.start, g.start + g.size) for g in self.graph.groups]
        kept = [np.flatnonzero(alive[span]).tolist() for span in spans]
        return plans.from_masks(self.graph, kept)

    def cut(
        self,
        alive: Bools,
        optimizer: torch.optim.Optimizer,
        friends: Sequence[Any],
        *,
        check: bool,
    ) -> None:
        """Remove what is not alive from the model, its optimizer and its friends, in place.

        Args:
            alive: bool [channels].
            optimizer: its state goes with the channels.
            friends: as for `psap.apply`.
            check: prove before that the small network equals the masked one.

        Raises:
            VerificationError: it does not; nothing was changed.
            PsapError: the optimizer's state cannot be cut by channel; nothing was changed.
        """
        result = apply(
            self.graph.model,
            self.step(alive),
            optimizer=optimizer,
            friends=friends,
            check=check,
            inplace=True,
        )
        self.proven(result)
        self.gone = self.left(self.gone, alive)
        self.graph, self.original = restricted(self.graph, alive), self.original[alive]

    def proven(self, result: Result) -> Literal["module", "graph"]:
        """Note how channels were removed, and let the result's report tell of all cuts so far.

        Returns:
            "graph" if any of them made programs of modules.
        """
        if result.mode == "graph":
            self.mode = "graph"
        if (proof := result.report["verification"]) is not None:
            proofs = [found for found in (self._proof, proof) if found]
            self._proof = {
                **proof,
                "max_relative_error": max(found["max_relative_error"] for found in proofs),
                "mode": self.mode,
                "silent": tuple(dict.fromkeys(n for found in proofs for n in found["silent"])),
            }
            result.report["verification"] = self._proof
        return self.mode

    def preview(self, alive: Bools) -> Graph:
        """The graph after a cut, of a copy of the model."""
        model = small_copy(self.graph.model, self.step(alive))
        return replace(restricted(self.graph, alive), model=model)

    def left(self, stats: Sequence[GroupStats], stays: Bools) -> list[GroupStats]:
        """Statistics with the powers of some channels of the model; bool [channels]."""
        pairs = zip(self.graph.groups, stats, strict=True)
        return [entry.of(stays[group.start : group.start + group.size]) for group, entry in pairs]

    def whole(self, stats: Sequence[GroupStats]) -> list[GroupStats]:
        """Statistics of the dense network: what is left, and what was removed as it was then.

        What is left alone is less sparse than the whole was, and would seem to have been pruned too
        much, the more the more it was pruned; and filters would be ranked without the inputs that
        they have lost.
        """
        return [entry + gone for entry, gone in zip(stats, self.gone, strict=True)]

    def remember(self, before: Sequence[GroupStats], after: Sequence[GroupStats]) -> None:
        """After a cut: `whole` goes on to give ``before`` where it gave ``after``."""
        parts = zip(self.gone, before, after, strict=True)
        self.gone = [gone + (one - two) for gone, one, two in parts]

    # State

    def state_dict(self) -> dict[str, Any]:
        """For every group the dense indices that the model has, and what was removed."""
        gone = [
            {"power": torch.from_numpy(g.power.copy()), "sparse": g.sparse, "elements": g.elements}
            for g in self.gone
        ]
        return {"kept": self._present(), "gone": gone}

    def _present(self) -> list[Tensor]:
        everything = np.ones(self.original.size, dtype=bool)
        return [torch.from_numpy(kept.copy()) for kept in self.kept(everything)]

    def read_state(self, state: Sequence[Any]) -> Bools:
        """What of the model as it is belongs to a state.

        Returns:
            bool [channels], all true if the model is what the state was taken of.

        Raises:
            StateError: the state is damaged, or the model has lost channels of it.
        """
        present = self._present()
        if len(state) != len(present):
            raise StateError("the state is damaged: it has another number of groups")
        alive = []
        for group, theirs, mine in zip(self.dense.groups, state, present, strict=True):
            theirs = torch.as_tensor(theirs).cpu()
            if theirs.dtype != torch.int64 or theirs.dim() != 1 or not theirs.numel():
                raise StateError(f"the state is damaged: it has no channels of {group.name}")
            if bool((theirs.diff() <= 0).any()) or not bool(torch.isin(theirs, mine).all()):
                raise StateError(
                    f"the state has channels of {group.name} that the model has no more; load it "
                    "into a new Pruner of the dense model"
                )
            alive.append(torch.isin(mine, theirs).numpy())
        return np.concatenate(alive)
