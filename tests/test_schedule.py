"""From sparsity ratios to widths: the budget, the floors, and the order of who is pruned."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from psap import schedule
from psap.schedule import Limits


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, list[Limits], np.ndarray, float]:
    count = draw(st.integers(1, 6))
    numbers = st.floats(0, 1, allow_subnormal=False)
    sparsity = np.array(draw(st.lists(numbers, min_size=count, max_size=count)))
    factors = np.array(draw(st.lists(st.floats(0.1, 1), min_size=count, max_size=count)))
    sizes = draw(st.lists(st.integers(1, 40), min_size=count, max_size=count))
    bounds = schedule.limits(
        sizes,
        draw(st.floats(0.1, 1)),
        draw(st.integers(1, 8)),
        draw(st.sampled_from([1, 2, 4, 8])),
    )
    prices = np.array(draw(st.lists(st.integers(1, 20), min_size=count, max_size=count)))
    return sparsity, factors, bounds, prices, draw(st.floats(0.01, 1.1))


@given(problems(), st.sampled_from([0.5, 1.0, 2.0]))
def test_budget_floors_and_quanta(problem, power: float) -> None:  # type: ignore[no-untyped-def]
    sparsity, factors, bounds, prices, share = problem
    sizes = np.array([b.size for b in bounds])
    budget = share * float(prices @ sizes)

    def fits(widths: np.ndarray) -> bool:
        return float(prices @ widths) <= budget

    widths = schedule.solve(sparsity, factors, power, bounds, fits)
    floors = np.array([b.nearest(b.floor) for b in bounds])
    assert widths.dtype == np.int64
    assert (widths >= floors).all() and (widths <= sizes).all()
    for width, bound in zip(widths, bounds, strict=True):
        assert width % bound.quantum == 0 or width == bound.size
        assert width >= bound.floor
    if fits(floors):
        assert fits(widths)
        for index, bound in enumerate(bounds):  # nothing more would fit
            larger = widths.copy()
            larger[index] = bound.above(int(widths[index]))
            assert larger[index] == widths[index] or not fits(larger)
    else:
        assert (widths == floors).all()


@given(problems())
def test_leftovers_go_to_one_group_after_the_other(problem) -> None:  # type: ignore[no-untyped-def]
    """Many groups at once are served exactly as they would be in turn, with and without room."""
    sparsity, _, bounds, prices, share = problem
    limit = schedule._Bounds(bounds)
    budget = share * float(prices @ limit.sizes)

    def fits(widths: np.ndarray) -> bool:
        return float(prices @ widths) <= budget

    def room(widths: np.ndarray, wider: np.ndarray) -> np.ndarray:
        return float(prices @ widths) + prices * (wider - widths) <= budget

    floors = limit.nearest(np.zeros(len(bounds)))
    order = np.argsort(sparsity, kind="stable")
    wanted, turn = floors.copy(), [int(g) for g in order] if fits(floors) else []
    while turn:
        served = []
        for g in turn:
            larger = wanted.copy()
            larger[g] = bounds[g].above(int(wanted[g]))
            if larger[g] > wanted[g] and fits(larger):
                wanted = larger
                served.append(g)
        turn = served
    if fits(floors):
        for known in (None, room):
            found = schedule._fill(floors, order, limit, fits, known)
            assert found.tolist() == wanted.tolist()


@given(problems())
def test_everything_stays_if_it_fits(problem) -> None:  # type: ignore[no-untyped-def]
    sparsity, factors, bounds, _, _ = problem
    widths = schedule.solve(sparsity, factors, 1.0, bounds, lambda _: True)
    assert widths.tolist() == [b.size for b in bounds]


def test_the_sparser_group_loses_more() -> None:
    bounds = schedule.limits([100, 100, 100], 1.0, 1, 1)
    widths = schedule.solve(
        np.array([0.2, 0.4, 0.8]), np.ones(3), 1.0, bounds, lambda w: w.sum() <= 200
    )
    assert widths[0] > widths[1] > widths[2]
    assert widths.sum() == 200
    assert (100 - widths[1]) / (100 - widths[0]) == pytest.approx(2, rel=0.1)


def test_a_larger_power_separates_more() -> None:
    bounds = schedule.limits([100, 100], 1.0, 1, 1)
    spread = [
        np.ptp(
            schedule.solve(
                np.array([0.3, 0.5]), np.ones(2), power, bounds, lambda w: w.sum() <= 120
            )
        )
        for power in (0.5, 1.0, 2.0)
    ]
    assert spread[0] < spread[1] < spread[2]


@pytest.mark.parametrize("sparsity", [[0.0, 0.0], [0.3, 0.3], [float("nan"), float("nan")]])
def test_without_a_difference_all_lose_the_same(sparsity: list[float]) -> None:
    bounds = schedule.limits([50, 50], 1.0, 1, 1)
    widths = schedule.solve(np.array(sparsity), np.ones(2), 2.0, bounds, lambda w: w.sum() <= 50)
    assert widths.tolist() == [25, 25]


def test_a_factor_protects_a_group() -> None:
    bounds = schedule.limits([50, 50], 1.0, 1, 1)
    widths = schedule.solve(
        np.array([0.3, 0.3]), np.array([0.5, 1.0]), 1.0, bounds, lambda w: w.sum() <= 70
    )
    assert widths[0] > widths[1]


def test_a_gain_acts_on_what_is_kept() -> None:
    bounds = schedule.limits([100, 100], 1.0, 1, 1)
    ones = np.ones(2)

    def solved(gains: list[float]) -> list[int]:
        fits = lambda w: w.sum() <= 60  # noqa: E731
        return schedule.solve(ones, ones, 1.0, bounds, fits, gains=np.array(gains)).tolist()

    assert solved([1.0, 1.0]) == [30, 30]
    assert solved([2.0, 1.0]) == [40, 20]
    assert solved([2.0, 0.5]) == [48, 12]
    assert solved([1.0, 0.1]) == [55, 5]  # and the budget is spent


def test_no_groups() -> None:
    assert schedule.solve(np.zeros(0), np.zeros(0), 1.0, [], lambda _: False).tolist() == []


@given(
    st.integers(1, 200), st.integers(1, 32), st.integers(1, 50), st.floats(0, 1), st.floats(0, 250)
)
def test_limits(size: int, quantum: int, least: int, ratio: float, width: float) -> None:
    (bound,) = schedule.limits([size], ratio, least, quantum)
    assert 1 <= bound.floor <= size
    assert bound.floor >= min(size, least)
    assert bound.floor >= (1 - ratio) * size - 1e-6 or bound.floor == size
    near = bound.nearest(width)
    assert bound.floor <= near <= size
    assert near % bound.quantum == 0 or near == size
    if bound.floor <= width <= size - bound.quantum:
        assert abs(near - width) <= bound.quantum / 2 or near == bound.nearest(bound.floor)
    above = bound.above(near)
    assert above > near or near == size


@pytest.mark.parametrize("kind", ["cubic", "linear"])
def test_the_kept_share_falls_from_one_to_the_target(kind) -> None:  # type: ignore[no-untyped-def]
    shares = [schedule.kept_share(t, 10, 0.3, kind) for t in range(1, 11)]
    assert shares[-1] == 0.3 == schedule.kept_share(99, 10, 0.3, kind)
    assert all(a > b for a, b in zip([1.0, *shares], shares, strict=False))
    steps = np.diff([1.0, *shares])
    assert (np.diff(steps) > 0).all() if kind == "cubic" else np.allclose(steps, -0.07)
    assert schedule.kept_share(5, 10, 0.3, "cubic") == pytest.approx(1 - 0.7 * (1 - 0.5**3))


def test_many_groups_take_few_evaluations() -> None:
    count = 10_000
    rng = np.random.default_rng(0)
    prices, sparsity = rng.integers(1, 1000, count), rng.uniform(0, 1, count)
    bounds = schedule.limits(rng.integers(8, 512, count).tolist(), 1.0, 1, 8)
    budget = 0.3 * float(prices @ [b.size for b in bounds])
    asked = 0

    def fits(widths: np.ndarray) -> bool:
        nonlocal asked
        asked += 1
        return float(prices @ widths) <= budget

    def room(widths: np.ndarray, wider: np.ndarray) -> np.ndarray:
        nonlocal asked
        asked += 1
        return float(prices @ widths) + prices * (wider - widths) <= budget

    widths = schedule.solve(sparsity, np.ones(count), 2.0, bounds, fits, room)
    assert 0.999 * budget < float(prices @ widths) <= budget
    assert asked < 150
