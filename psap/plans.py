"""A plan says which channels of a model stay: pure data, comparable, serialisable, explained."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import Tensor, nn

from psap import choices, schedule, scores, targets
from psap.calling import called
from psap.config import Target, checked_floors
from psap.cost import Cost, CostModel, LayerCost
from psap.errors import ArgumentError, ArgumentTypeError
from psap.graph import Graph
from psap.graph.parts import part
from psap.inputspec import specs
from psap.members import all_tensors
from psap.plandiff import PlanDiff, diff

if TYPE_CHECKING:
    from psap.latency import LatencyTable


@dataclass(frozen=True)
class GroupPlan:
    """What stays of one channel group.

    Attributes:
        name: name of the group.
        size: channels before.
        kept: indices within the group that stay, ascending.
        layers: modules that shrink with it.
        part: which channels of the layer that it is named after it is, such as "channels 4-11 of
            16"; "" if it is all of them.
    """

    name: str
    size: int
    kept: tuple[int, ...]
    layers: tuple[str, ...]
    part: str = field(default="", compare=False)


@dataclass(frozen=True)
class SidePlan:
    """What stays along one dimension of a parameter or buffer.

    Attributes:
        name: the parameter or buffer.
        dim: its dimension.
        role: "out" if zeros there make the channel zero, "in" if the channel is read there, "cut"
            if it is and would not be zero.
        size: positions before.
        kept: positions that stay, ascending.
    """

    name: str
    dim: int
    role: str
    size: int
    kept: tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """A residual branch: what is added to a shortcut without weights.

    Attributes:
        name: that of its largest layer.
        tensors: the parameters and buffers that only it uses.
    """

    name: str
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """Which channels of a model stay: what `psap.plan` returns and `psap.apply` carries out.

    Attributes:
        architecture: fingerprint of names and shapes of all parameters and buffers.
        groups: what stays of every group.
        sides: every dimension that shrinks.
        before: cost of the dense network.
        after: cost of the small one.
        layers: cost of every weight, before and after.
        left_alone: why a layer keeps all of its channels, or "layer (channels 0-3 of 8)" those.
        inputs: what the model was traced with: an `InputSpec` in the place of every tensor.
        graph: the graph it was made from; absent after `from_json`.
        counted: whether a norm counts channels that go, so that only graph mode is exact.
        dropped: residual branches that go (`psap.drop_blocks`); then no channel does.
        without: names of the branches that the model has lost before, one tuple for each time.
    """

    architecture: str
    groups: tuple[GroupPlan, ...]
    sides: tuple[SidePlan, ...]
    before: Cost
    after: Cost
    layers: tuple[tuple[LayerCost, LayerCost], ...]
    left_alone: Mapping[str, str]
    inputs: Any
    graph: Graph | None = field(default=None, compare=False, repr=False)
    counted: bool = field(default=False, compare=False)
    dropped: tuple[Block, ...] = ()
    without: tuple[tuple[str, ...], ...] = ()

    def __repr__(self) -> str:
        name = "" if self.graph is None else f"{type(self.graph.model).__name__}: "
        macs = self.after.macs / max(1, self.before.macs)
        parameters = self.after.parameters / max(1, self.before.parameters)
        what = f"{len(self.dropped)} branches" if self.dropped else f"{len(self.groups)} groups"
        return (
            f"Plan({name}{what}, MACs {100 * macs:.1f} % kept, "
            f"parameters {100 * parameters:.1f} % kept)"
        )

    def kept(self) -> dict[str, dict[int, tuple[int, ...]]]:
        """The kept positions by parameter or buffer, then by dimension."""
        table: dict[str, dict[int, tuple[int, ...]]] = {}
        for side in self.sides:
            table.setdefault(side.name, {})[side.dim] = side.kept
        return table

    def explain(self) -> str:
        """A text that says for every group what goes, and for every other layer why it stays."""
        share = self.after.macs / max(1, self.before.macs)
        lines = [
            f"MACs {self.before.macs:,} -> {self.after.macs:,} ({share:.1%} kept), parameters "
            f"{self.before.parameters:,} -> {self.after.parameters:,} "
            f"({self.after.parameters / max(1, self.before.parameters):.1%} kept)"
        ]
        if self.before.latency_ms and self.after.latency_ms is not None:
            lines[0] += (
                f", predicted latency {self.before.latency_ms:.3f} -> {self.after.latency_ms:.3f} "
                f"ms ({self.after.latency_ms / self.before.latency_ms:.1%} kept)"
            )
        width = max([len(group.name) for group in self.groups] + [8])
        for group in self.groups:
            gone = group.size - len(group.kept)
            others = [name for name in group.layers if name != group.name]
            tail = f"  with {', '.join(others[:4])}" + (" ..." if len(others) > 4 else "")
            part = f"  of {group.part}" if group.part else ""
            lines.append(
                f"  {group.name:<{width}}  {group.size:>5} -> {len(group.kept):>5}  "
                f"({gone} removed){part}{tail if others else ''}"
            )
        lines += [f"  without the residual branch of {block.name}" for block in self.dropped]
        before = [name for names in self.without for name in names]
        lines += [f"  (dropped before: the residual branch of {name})" for name in before]
        if self.left_alone:
            lines.append("left alone:")
            width = max([len(name) for name in self.left_alone] + [8])
            lines += [f"  {name:<{width}}  {why}" for name, why in self.left_alone.items()]
        return "\n".join(lines)

    def diff(self, other: Plan) -> PlanDiff:
        """What this plan removes and another does not, and the other way round, by group.

        Raises:
            ArgumentTypeError: ``other`` is no plan.
            ArgumentError: it was made for another model, or has other channel groups.
        """
        return diff(self, other)

    def to_json(self) -> str:
        """The plan as JSON text; index lists are written as ranges such as "0-3,7"."""
        from psap.planfile import to_json

        return to_json(self)

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read what `to_json` wrote.

        Raises:
            FileError: it is no plan, is damaged, or has a newer version.
        """
        from psap.planfile import from_json

        return from_json(text)


def fingerprint(model: nn.Module, tensors: Mapping[str, Tensor] | None = None) -> str:
    """SHA-256 over the names and shapes of all parameters and buffers.

    Args:
        model: the model.
        tensors: its `all_tensors`, where they are known.
    """
    named = (all_tensors(model) if tensors is None else tensors).items()
    text = "\n".join(f"{name} {tuple(tensor.shape)}" for name, tensor in named)
    return hashlib.sha256(text.encode()).hexdigest()


def from_masks(graph: Graph, kept: Sequence[Sequence[int]], cost: CostModel | None = None) -> Plan:
    """The plan that keeps the given channels.

    Args:
        graph: the channel graph.
        kept: for every group the indices that stay, ascending, at least one.
        cost: the cost model of the graph, if there is one already.
    """
    cost = cost or CostModel(graph)
    alive = np.zeros(int(sum(group.size for group in graph.groups)) + 1, dtype=bool)
    alive[-1] = True  # channel -1: positions that no group owns
    for group, indices in zip(graph.groups, kept, strict=True):
        alive[group.start + np.asarray(indices, dtype=np.int64)] = True
    sides = []
    positions: dict[int, tuple[int, ...]] = {}  # many sides have the same channels
    for (name, dim), channels in graph.channels.items():
        if id(channels) not in positions:
            positions[id(channels)] = tuple(np.flatnonzero(alive[channels]).tolist())
        stays = positions[id(channels)]
        if len(stays) < channels.size:
            sides.append(SidePlan(name, dim, graph.roles[name, dim], channels.size, stays))
    widths = [len(indices) for indices in kept]
    return Plan(
        architecture=fingerprint(graph.model),
        groups=tuple(
            GroupPlan(g.name, g.size, tuple(int(i) for i in k), g.layers, part(graph, g))
            for g, k in zip(graph.groups, kept, strict=True)
        ),
        sides=tuple(sides),
        before=cost.dense,
        after=cost.cost(widths),
        layers=tuple(zip(cost.layers(cost.sizes), cost.layers(widths), strict=True)),
        left_alone=dict(graph.left_alone),
        inputs=specs(graph.inputs),
        graph=graph,
        counted=any(len(kept[n]) < graph.groups[n].size for n in graph.counted),
        without=vars(graph.model).get(DROPPED, ()),
    )


DROPPED = "psap_dropped"
"""The attribute in which a model keeps the names of the residual branches that it has lost."""

Score = Literal["l1", "l2", "random"]


@called("psap.plan(graph, ratio=0.5) or psap.plan(graph, target=psap.Target(macs=0.3))")
def plan(
    graph: Graph,
    *,
    ratio: float | Mapping[str, float] | None = None,
    target: Target | None = None,
    score: Score | Mapping[str, Tensor] = "l2",
    round_to: int | Literal["measured"] = 1,
    min_channels: int = 1,
    floors: Mapping[str, float] | None = None,
    seed: int = 0,
    latency: LatencyTable | None = None,
) -> Plan:
    """Choose which channels stay; the model is not changed.

    Give either ``ratio`` or ``target``. A group loses ``floor(ratio * size)`` channels, so 0.5
    removes half of the channels of every layer that can be pruned. With a target, ratios follow
    the weight sparsity ratio of each group, as in a `Pruner` (docs/method.md, equations 1 to 3).

    Args:
        graph: what `psap.trace` returned.
        ratio: removed share in [0, 1), for all groups or by group name (others keep everything).
        target: bounds on the cost of the small network.
        score: "l2" or "l1" norms relative to the layer, "random", or importances [C_g] by group
            name.
        round_to: widths are multiples of this where the group is large enough; "measured" makes the
            small network for several of them and takes the fastest (`psap.rounding`).
        min_channels: no group keeps fewer.
        floors: least kept share by the name of a layer, as in `Config`; 1 leaves it whole.
        seed: for score="random".
        latency: what `measure_latency` returned; for Target(latency=...), and for the cost in the
            plan.

    Raises:
        ArgumentError: a value is out of range, a name is unknown, or the model has changed since.
        ArgumentTypeError: an argument has the wrong type.
        TargetError: nothing can be pruned, or the target cannot be met.
    """
    _check_call(graph, ratio, target)
    if round_to == "measured":
        from psap.rounding import fastest

        return fastest(
            graph,
            ratio=ratio,
            target=target,
            score=score,
            min_channels=min_channels,
            floors=floors,
            seed=seed,
            latency=latency,
        ).plan
    choices.check_whole("round_to", round_to, 1)
    choices.check_whole("min_channels", min_channels, 1)
    choices.check_whole("seed", seed, 0)
    tensors = _fresh_tensors(graph)
    cost = CostModel(graph, latency)
    least = choices.floors(graph, checked_floors("plan", floors or {}))
    bounds = schedule.limits([g.size for g in graph.groups], 1.0, min_channels, round_to, least)
    alpha = 0.5 if ratio is None else None
    stats = scores.measure(graph, tensors, alpha, "l1" if score == "l1" else "l2")
    if ratio is not None:
        widths = choices.by_ratio(graph, ratio, bounds)
    else:
        assert target is not None
        widths = targets.solve_target(graph, cost, stats, bounds, target)
    values = choices.importances(graph, stats, score, seed)
    kept = [scores.strongest(v, int(w)) for v, w in zip(values, widths, strict=True)]
    return from_masks(graph, kept, cost)


def _check_call(graph: Any, ratio: Any, target: Any) -> None:
    if not isinstance(graph, Graph):
        raise ArgumentTypeError(
            f"graph is a {type(graph).__name__}; pass psap.trace(model, example_inputs)"
        )
    if (ratio is None) == (target is None):
        raise ArgumentError("give either ratio=0.5 or target=psap.Target(macs=0.3), and not both")
    if ratio is None and not isinstance(target, Target):
        raise ArgumentTypeError(f"target is {target!r}; pass psap.Target(macs=0.3), for example")
    if not graph.groups:
        raise targets.nothing_to_prune(graph)


def _fresh_tensors(graph: Graph) -> dict[str, Tensor]:
    """All tensors of the model, which must be as they were when it was traced."""
    tensors = all_tensors(graph.model)
    for name, shape in graph.shapes.items():
        if name not in tensors or tuple(tensors[name].shape) != tuple(shape):
            now = f"has shape {tuple(tensors[name].shape)}" if name in tensors else "is gone"
            raise ArgumentError(
                f"the model has changed since it was traced; trace it again with psap.trace(model, "
                f"example_inputs): {name} had shape {tuple(shape)} and {now}"
            )
    return tensors
