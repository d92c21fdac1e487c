"""What became of every channel: the life of each one, told from the recorded events."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from psap.report.record import Candidate, Group, Step, Window
from psap.report.text import plain_number


class Fate(Enum):
    """How a channel ended; the value is its class in the page's style sheet."""

    KEPT = "kept"
    LEFT_ALONE = "alone"
    RETURNED = "returned"
    RESTORED = "restored"
    PRUNED = "gone"
    PRUNED_AGAIN = "again"


@dataclass(frozen=True, kw_only=True)
class Life:
    """One channel.

    Attributes:
        fate: how it ended.
        step: the prune step that removed it for good, None if it lives or no step is known.
        story: what happened to it, in order, as plain text.
    """

    fate: Fate
    step: int | None
    story: str


@dataclass(frozen=True, kw_only=True)
class _Event:
    """Something that happened to a channel: (step, order) sorts."""

    step: int
    order: int
    kind: str
    text: str


def _told(candidate: Candidate) -> str:
    verb = "restored" if candidate.restored else "not restored"
    reason = f" ({candidate.reason})" if candidate.reason else ""
    numbers = f"z {plain_number(candidate.z)}, value {plain_number(candidate.value)}"
    return f"window of step {candidate.step}: {numbers}, {verb}{reason}"


def _events(
    group: Group, steps: Sequence[Step], windows: Sequence[Window]
) -> dict[int, list[_Event]]:
    events: dict[int, list[_Event]] = defaultdict(list)
    judged: set[tuple[int, int]] = set()
    watched = {window.step for window in windows if window.supervised.get(group.name)}
    for window in windows:
        for item in window.candidates:
            if item.group == group.name:
                judged.add((window.step, item.channel))
                kind = "restored" if item.restored else "judged"
                event = _Event(step=window.step, order=2, kind=kind, text=_told(item))
                events[item.channel].append(event)
    for step in steps:
        t = step.step
        for i in step.returned.get(group.name, ()):
            text = f"brought back by the ranking at step {t}"
            events[i].append(_Event(step=t, order=0, kind="returned", text=text))
        for i in step.pruned.get(group.name, ()):
            events[i].append(_Event(step=t, order=1, kind="pruned", text=f"pruned at step {t}"))
            if t in watched and (t, i) not in judged:
                text = f"window of step {t}: watched, no positive value"
                events[i].append(_Event(step=t, order=2, kind="judged", text=text))
    return events


def _life(alive: bool, left_alone: bool, events: list[_Event]) -> Life:
    events = sorted(events, key=lambda event: (event.step, event.order))
    kinds = {event.kind for event in events}
    pruned_at = [event.step for event in events if event.kind == "pruned"]
    step = None if alive or not pruned_at else pruned_at[-1]
    if alive and "restored" in kinds:
        fate, end = Fate.RESTORED, "alive at the end"
    elif alive and kinds:
        fate, end = Fate.RETURNED, "alive at the end"
    elif alive:
        fate, end = (Fate.LEFT_ALONE, "left alone") if left_alone else (Fate.KEPT, "kept")
    elif kinds & {"restored", "returned"}:
        fate, end = Fate.PRUNED_AGAIN, "pruned again"
    else:
        fate, end = Fate.PRUNED, "" if pruned_at else "pruned"
    story = "\n".join([event.text for event in events] + ([end] if end else []))
    return Life(fate=fate, step=step, story=story)


def lives(group: Group, steps: Sequence[Step], windows: Sequence[Window]) -> list[Life]:
    """The life of every channel of a group, by index. Events of unknown channels are ignored."""
    events = _events(group, steps, windows)
    alone = group.reason is not None
    return [_life(i in group.kept, alone, events.get(i, [])) for i in range(group.size)]


def tally(
    groups: Sequence[Group], steps: Sequence[Step], windows: Sequence[Window]
) -> dict[str, int]:
    """What became of channels, in numbers; those that came back in two ways count as restored.

    Returns:
        ``pruned``: gone in the end. ``watched``: looked at in windows. ``restored``: brought back
        by a window, and ``restored_stayed``: of them, in the final network. ``returned``: brought
        back by the ranking, and ``returned_stayed``.
    """
    back = {(c.group, c.channel) for c in restored(windows)}
    ranked = {
        (group.name, i)
        for group in groups
        for step in steps
        for i in step.returned.get(group.name, ())
    } - back
    kept = {(group.name, i) for group in groups for i in group.kept}
    return {
        "pruned": sum(group.size - len(group.kept) for group in groups),
        "watched": round(sum(sum(v or 0 for v in w.supervised.values()) for w in windows)),
        "restored": len(back),
        "restored_stayed": len(back & kept),
        "returned": len(ranked),
        "returned_stayed": len(ranked & kept),
    }


def restored(windows: Sequence[Window]) -> list[Candidate]:
    """The candidates that came back, in order of time."""
    return [item for window in windows for item in window.candidates if item.restored]
