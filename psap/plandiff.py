"""What two plans of one model remove differently."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from psap.cost import Cost
from psap.errors import ArgumentError, ArgumentTypeError
from psap.graph.alike import packed

if TYPE_CHECKING:
    from psap.plans import Plan

FORMAT = "psap-plan-diff"
VERSION = 1


@dataclass(frozen=True)
class GroupDiff:
    """What two plans remove differently from one channel group.

    Attributes:
        name: name of the group.
        size: channels before.
        first: indices that only the first plan removes, ascending.
        second: indices that only the second plan removes, ascending.
        both: how many both remove.
        part: which channels of its layer the group is, if not all; indices count within the group.
    """

    name: str
    size: int
    first: tuple[int, ...]
    second: tuple[int, ...]
    both: int
    part: str = ""


@dataclass(frozen=True)
class PlanDiff:
    """What `Plan.diff` returns; false if both plans remove the same.

    Attributes:
        groups: every group of which the plans remove different channels.
        same: how many groups they treat alike.
        before: cost of the dense network.
        first: cost of the first plan's small network.
        second: cost of the second plan's.
    """

    groups: tuple[GroupDiff, ...]
    same: int
    before: Cost
    first: Cost
    second: Cost

    def __bool__(self) -> bool:
        return bool(self.groups)

    def explain(self) -> str:
        """A text that says for every group which channels only one of the plans removes."""
        if not self:
            return f"both plans remove the same channels, in all of {self.same} groups"
        lines = [
            f"other channels in {len(self.groups)} of {len(self.groups) + self.same} groups; "
            f"kept by the first and by the second plan: MACs {self._shares('macs')}, "
            f"parameters {self._shares('parameters')}"
        ]
        width = max(len(group.name) for group in self.groups)
        for group in self.groups:
            parts = [
                f"only the {which} removes {packed(found)} ({len(found)})"
                for which, found in (("first", group.first), ("second", group.second))
                if found
            ]
            tail = f"; both remove {group.both}" if group.both else ""
            tail += f"  (counted within {group.part})" if group.part else ""
            lines.append(f"  {group.name:<{width}}  {group.size:>5}  {'; '.join(parts)}{tail}")
        return "\n".join(lines)

    def _shares(self, kind: str) -> str:
        dense = max(1, getattr(self.before, kind))
        shares = [getattr(cost, kind) / dense for cost in (self.first, self.second)]
        return f"{shares[0]:.1%} and {shares[1]:.1%}"

    def to_json(self) -> str:
        """The same as JSON text; index lists are written as ranges such as "0-3,7"."""
        body = {
            "format": FORMAT,
            "version": VERSION,
            "groups": [
                {**vars(group), "first": packed(group.first), "second": packed(group.second)}
                for group in self.groups
            ],
            "same": self.same,
            "before": vars(self.before),
            "first": vars(self.first),
            "second": vars(self.second),
        }
        return json.dumps(body)


def diff(first: Plan, second: Plan) -> PlanDiff:
    """Compare two plans of one model.

    Raises:
        ArgumentTypeError: one is no plan.
        ArgumentError: they were made for different models, or from different traces of one.
    """
    if type(second) is not type(first):
        raise ArgumentTypeError(f"other is a {type(second).__name__}; pass another psap.Plan")
    gone = [_gone(plan) for plan in (first, second)]
    if gone[0] != gone[1] or first.without != second.without:
        odd = sorted(gone[0] ^ gone[1]) or ["those that went before"]
        raise ArgumentError(
            f"the plans drop different residual branches ({', '.join(odd)}), and speak of the "
            "channels of different networks"
        )
    if first.architecture != second.architecture:
        raise ArgumentError(
            "the plans were made for different models: names or shapes of parameters differ"
        )
    sizes = [{group.name: group.size for group in plan.groups} for plan in (first, second)]
    if sizes[0] != sizes[1]:
        names = [
            name for name in {**sizes[0], **sizes[1]} if sizes[0].get(name) != sizes[1].get(name)
        ]
        raise ArgumentError(
            f"the plans have different channel groups, such as {names[0]!r}; make both from one "
            "psap.trace, with the same parameters frozen"
        )
    others = {group.name: set(group.kept) for group in second.groups}
    groups = []
    for group in first.groups:
        kept, other = set(group.kept), others[group.name]
        if kept != other:
            both = group.size - len(kept | other)
            only = tuple(sorted(other - kept)), tuple(sorted(kept - other))
            groups.append(GroupDiff(group.name, group.size, *only, both, group.part))
    same = len(first.groups) - len(groups)
    return PlanDiff(tuple(groups), same, first.before, first.after, second.after)


def _gone(plan: Plan) -> set[str]:
    """The residual branches that a network loses, or has lost before."""
    before = {name for names in plan.without for name in names}
    return before | {block.name for block in plan.dropped}
