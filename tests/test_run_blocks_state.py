"""What a checkpoint says of dropped branches is checked when a run is resumed, not at its end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_run_blocks import deep

import psap
from psap.run_blocks import Dropped


@pytest.fixture(scope="module")
def state() -> dict[str, Any]:
    left = psap.drop_blocks(deep(), torch.zeros(2, 1, 8, 8), blocks=["4.*"])
    left.report["blocks"] = [{"block": None, "loss": 2.0, "macs_share": 1.0}]
    return Dropped.of(left).state_dict()


def test_what_was_saved_is_read(state: dict[str, Any]) -> None:
    for saved in (state, Dropped.of(None).state_dict()):
        assert Dropped.from_state(saved).state_dict() == saved


@pytest.mark.parametrize(
    "change",
    [
        {"blocks": None},
        {"blocks": ["4.conv1"]},
        {"blocks": [{"block": "4.conv1", "loss": "x", "macs_share": 1.0}]},
        {"verification": None},
        {"verification": {}},
    ],
)
def test_a_damaged_report_is_refused(state: dict[str, Any], change: dict[str, Any]) -> None:
    damaged = {**state, "report": {**state["report"], **change}}
    with pytest.raises(psap.StateError, match="does not tell which residual branches have gone"):
        Dropped.from_state(damaged)
    for report in ({}, [], None, 3):
        with pytest.raises(psap.StateError, match="does not tell which residual branches"):
            Dropped.from_state({**state, "report": report})
