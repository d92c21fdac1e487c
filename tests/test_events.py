"""Events as JSON, and back."""

from __future__ import annotations

import json
import re
from dataclasses import FrozenInstanceError, fields

import pytest
from pruner_nets import make, train

from psap.events import Candidate, PruneEvent, WindowEvent, event_from_json, event_to_json

PRUNE = PruneEvent(
    step=1,
    call=2,
    iteration=30,
    target_share=0.1 + 0.2,
    macs_share=0.3,
    parameters_share=1 / 3,
    sparsity={"a": 0.1},
    sparsity_ema={"a": 0.7},
    widths={"a": 4},
    pruned={"a": [1, 2]},
    returned={},
)
WINDOW = WindowEvent(
    step=1,
    iteration=38,
    observed=7,
    skipped=1,
    supervised={"a": 2},
    candidates=(
        Candidate(group="a", channel=1, value=1e-300, z=3.1, restored=True, reason="r"),
        Candidate(group="a", channel=2, value=0.1, z=-0.0, restored=False, reason="ä"),
    ),
)


@pytest.mark.parametrize("event", [PRUNE, WINDOW])
def test_through_json_text(event: PruneEvent | WindowEvent) -> None:
    body = event_to_json(event)
    assert body["kind"] == ("prune" if event is PRUNE else "window")
    assert set(body) == {"kind", *(item.name for item in fields(event))}
    found = event_from_json(json.loads(json.dumps(body)))
    assert found == event and type(found) is type(event)
    assert event_from_json(body) == event
    assert body == event_to_json(event)  # reading does not change what is read


def test_json_is_a_copy() -> None:
    event_to_json(PRUNE)["pruned"]["a"].append(9)
    assert PRUNE.pruned == {"a": [1, 2]}
    with pytest.raises(FrozenInstanceError, match="cannot assign"):
        PRUNE.step = 3


@pytest.mark.parametrize(
    "damage", [{"kind": "x"}, {"step": 1}, {**event_to_json(PRUNE), "more": 1}, {}]
)
def test_what_is_no_event_is_refused(damage: dict[str, object]) -> None:
    with pytest.raises((KeyError, TypeError), match=r"kind|argument|candidates"):
        event_from_json(damage)


def test_events_of_a_run_tell_who_went_and_who_came() -> None:
    """Replaying the events from all channels gives the masks."""
    model, opt, pruner = make("residual", protect="pulse", z_threshold=0.3, restore_share=0.5)
    train(model, opt, pruner, epochs=3, iterations=5)
    train(model, opt, iterations=3)
    assert pruner.done
    alive = {g.name: set(range(g.size)) for g in pruner.graph.groups}
    for event in pruner.events:
        event = event_from_json(json.loads(json.dumps(event_to_json(event))))
        if isinstance(event, PruneEvent):
            for name, rows in event.returned.items():
                assert not alive[name] & set(rows)
                alive[name] |= set(rows)
            for name, rows in event.pruned.items():
                assert alive[name] >= set(rows)
                alive[name] -= set(rows)
            assert {n: len(rows) for n, rows in alive.items()} == event.widths
        else:
            for candidate in event.candidates:
                if candidate.restored:
                    alive[candidate.group].add(candidate.channel)
                    swap = re.match(r"swapped with channel (\d+),", candidate.reason)
                    if swap:
                        alive[candidate.group].remove(int(swap[1]))
    assert any(
        c.restored for e in pruner.events if isinstance(e, WindowEvent) for c in e.candidates
    )
    assert {n: set(m.nonzero().flatten().tolist()) for n, m in pruner.masks().items()} == alive
    assert [e.iteration for e in pruner.events] == sorted(e.iteration for e in pruner.events)
