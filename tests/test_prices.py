"""Prices of channel groups, against formulas written from docs/method.md, section 2."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from pruner_nets import make, train

import psap
from psap import prices
from psap.events import PruneEvent, WindowEvent

MACS, BOTH = psap.Target(macs=0.5), psap.Target(macs=0.5, parameters=0.5)


def priced(pruner: psap.Pruner, dead: dict[int, float], target: psap.Target = MACS) -> list[float]:
    """Prices of conv1 (8 channels) and conv2 (12 channels); ``dead``: channel to value."""
    alive, value = np.ones(20, dtype=bool), np.full(20, 5.0)  # values of kept channels do not count
    alive[list(dead)] = False
    value[list(dead)] = list(dead.values())
    return prices.prices(pruner.graph, pruner.cost, target, alive, value).tolist()


def test_a_price_is_mean_usefulness_over_the_cost_of_one_channel() -> None:
    pruner = make("chain")[2]
    dense = pruner.cost.dense
    # With 6 and 11 channels, one more of conv1 costs 27 + 99 weights, of conv2 54 + 5 in the head.
    found = priced(pruner, {0: 0.5, 3: 1.5, 8: 0.4})
    assert found[0] == pytest.approx(1.0 / (64 * (27 + 9 * 11) / dense.macs), rel=1e-6)
    assert found[1] == pytest.approx(0.4 / ((64 * 54 + 5) / dense.macs), rel=1e-6)
    both = priced(pruner, {0: 0.5, 3: 1.5, 8: 0.4}, BOTH)
    more = (27 + 99 + 2) / dense.parameters  # and an affine pair
    assert both[0] == pytest.approx(1.0 / (64 * 126 / dense.macs + more), rel=1e-6)


def test_harmful_channels_are_worth_nothing_and_full_groups_have_no_price() -> None:
    found = priced(make("chain")[2], {1: -3.0, 2: 1.0})
    assert found[0] == pytest.approx(priced(make("chain")[2], {1: 0.0, 2: 1.0})[0])
    assert math.isnan(found[1])


def test_adjust() -> None:
    ones = np.ones(3)
    assert prices.adjust(ones, np.array([4.0, 1.0, np.nan]), 0.5, 3.0) == pytest.approx(
        [4**0.25, 4**-0.25, 1.0]
    )
    twice = prices.adjust(np.array([2.0, 0.5, 0.7]), np.array([4.0, 1.0, np.nan]), 0.5, 2.5)
    assert twice == pytest.approx([2.5, 0.4, 0.7])  # clipped at both ends
    for nothing in ([0.0, 0.0, 0.0], [np.nan] * 3, [2.0, np.nan, np.nan], [3.0, 3.0, 3.0]):
        assert prices.adjust(ones, np.array(nothing), 0.5, 3.0).tolist() == [1, 1, 1]
    useless = prices.adjust(ones, np.array([1.0, 0.0, np.nan]), 0.5, 1e6)
    assert useless[1] == pytest.approx(0.5e-3**0.25)  # counts as a thousandth of the mean


def test_a_window_sets_the_factors_and_the_next_step_uses_them() -> None:
    model, opt, pruner = make("chain", protect="price", window=3, prune_steps=2)
    train(model, opt, pruner, epochs=1)
    train(model, opt, iterations=3, first=20)
    prune, window = pruner.events
    assert isinstance(prune, PruneEvent) and isinstance(window, WindowEvent)
    value, _ = pruner._window.significance()
    wanted = prices.prices(pruner.graph, pruner.cost, pruner.config.target, pruner._alive, value)
    assert list(window.prices.values()) == wanted.tolist()
    factors = prices.adjust(np.ones(2), wanted, 0.25, 2.0)
    assert list(window.factors.values()) == factors.tolist() == pruner._factors.tolist()
    assert factors.min() < 1 < factors.max()
    assert not any(c.restored for c in window.candidates)
    train(model, opt, pruner, epochs=1, first=30)
    assert pruner.done and pruner._left == 0  # no window after the last prune step


@pytest.mark.parametrize("dear", [0, 1])
def test_the_dear_group_keeps_more(dear: int, monkeypatch: pytest.MonkeyPatch) -> None:
    widths = {}
    for price in (1.0, 100.0):

        def found(*_: Any, price: float = price) -> np.ndarray:
            return np.array([price, 1.0] if dear == 0 else [1.0, price])

        monkeypatch.setattr(prices, "prices", found)
        model, opt, pruner = make("chain", protect="price", window=2)
        train(model, opt, pruner, epochs=3)
        widths[price] = list(pruner.events[-1].widths.values())
        assert pruner.events[-1].macs_share <= 0.4
    assert widths[100.0][dear] > widths[1.0][dear]
    assert widths[100.0][1 - dear] < widths[1.0][1 - dear]


@pytest.mark.filterwarnings(r"ignore:step\(\) was called:psap.PsapWarning")
def test_without_an_observation_nothing_changes() -> None:
    _, _, pruner = make("chain", protect="price")
    pruner.step()
    pruner.step()  # closes the window at once
    assert pruner._factors.tolist() == [1.0, 1.0]
    assert pruner.events[1].observed == 0
