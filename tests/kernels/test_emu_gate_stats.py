"""The CUDA kernel of gate_stats_, on the emulator: lanes, long rows, what is taken back."""

from __future__ import annotations

import math

import pytest
import torch
from emulation import Emulated
from test_gate_stats import DTYPES, state

from psap_kernels import reference


def terms_of(channels: int, per: int, pairs: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random terms; on average `per` a channel, some channels without any."""
    lengths = torch.randint(0, 2 * per + 1, (channels,))
    lengths[channels // 2] = 0
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    terms = torch.randint(0, rows, (int(offsets[-1]), 3))
    terms[:, 0] %= pairs
    return terms.int(), offsets.int()


def same(got, want) -> None:
    torch.testing.assert_close(got[0], want[0], rtol=1e-11, atol=1e-11)
    assert got[1].tolist() == want[1].tolist()


@pytest.mark.parametrize("schedule", range(5))
@pytest.mark.parametrize("per", [0, 1, 2, 3, 5, 9, 17, 40])
def test_any_number_of_lanes_for_a_channel(plain, per, schedule):
    plain.module.set_schedule(schedule)
    try:
        channels = 150 if per < 9 else 37
        terms, offsets = terms_of(channels, per, 2, 30)
        values = [torch.randn(30), torch.randn(30, 3, dtype=torch.float64)]
        grads = [torch.randn(60)[::2], torch.randn(3, 30, dtype=torch.float64).t()]
        got, want = state(channels), state(channels)
        for bad in (0.0, math.nan, 0.0, math.inf, 1.0):
            changed = [values[0] + bad, values[1]]
            plain.gate_stats_(*got, changed, grads, terms, offsets, 0.5)
            reference.gate_stats_(*want, changed, grads, terms, offsets, 0.5)
        same(got, want)
    finally:
        plain.module.set_schedule(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("skew", range(9))
def test_long_rows_wherever_they_begin(plain, dtype, skew):
    for other in (skew, 0):
        values = [torch.randn(5 * n + skew).to(dtype)[skew:].view(5, n) for n in (9, 37, 300, 521)]
        grads = [torch.randn(5 * n + other).to(dtype)[other:].view(5, n) for n in (9, 37, 300, 521)]
        terms, offsets = terms_of(6, 3, 4, 5)
        got, want = state(6), state(6)
        plain.gate_stats_(*got, values, grads, terms, offsets, 2.0)
        reference.gate_stats_(*want, values, grads, terms, offsets, 2.0)
        same(got, want)


def test_sums_are_put_back_to_the_bit(plain):
    channels = 700
    terms = torch.stack([torch.zeros(channels), *[torch.arange(channels)] * 2], 1).int()
    offsets = torch.arange(channels + 1, dtype=torch.int32)
    values, grads = torch.randn(channels), torch.randn(channels)
    sums = torch.randn(2, channels, dtype=torch.float64) * 1e-3
    before, seen = sums.clone(), torch.zeros(2, dtype=torch.int64)
    for at in (0, 350, channels - 1):
        bad = values.clone()
        bad[at] = math.inf
        plain.gate_stats_(sums, seen, [bad], [grads], terms, offsets, 1.0)
        assert torch.equal(sums, before)
    plain.gate_stats_(sums, seen, [values], [grads], terms, offsets, 1.0)
    assert torch.equal(sums[0], before[0] + values.double() * grads.double())
    assert seen.tolist() == [1, 3]


def test_the_same_bits_in_every_order_of_threads(plain):
    values, grads = [torch.randn(30), torch.randn(30, 70)], [torch.randn(30), torch.randn(30, 70)]
    results = []
    for pairs in (1, 2):
        terms, offsets = terms_of(40, 5, pairs, 30)
        for schedule in range(plain.module.SCHEDULES):
            plain.module.set_schedule(schedule)
            results.append(state(40))
            plain.gate_stats_(*results[-1], values[:pairs], grads[:pairs], terms, offsets, 0.3)
        plain.module.set_schedule(0)
        assert all(torch.equal(r[0], results[-1][0]) for r in results[-plain.module.SCHEDULES :])


@pytest.mark.parametrize("pairs", [1, 26, 240])
def test_many_pairs_by_value_and_by_table(plain, pairs):
    values = [torch.randn(4, 1 + k % 3 * 10) for k in range(pairs)]
    grads = [torch.randn_like(v) for v in values]
    terms, offsets = terms_of(20, 4, pairs, 4)
    terms[:, 0] = torch.randint(0, pairs, (terms.shape[0],))
    got, want = state(20), state(20)
    plain.gate_stats_(*got, values, grads, terms, offsets, 1.0)
    reference.gate_stats_(*want, values, grads, terms, offsets, 1.0)
    same(got, want)


@pytest.mark.parametrize(
    "offsets", [[1, 2, 4], [0, 2, 3], [0, 3, 2], [0, 5, 4], [-1, 2, 4]], ids=str
)
def test_offsets_that_do_not_cover_the_terms_trap(plain, offsets):
    terms = torch.zeros(4, 3, dtype=torch.int32)
    fresh = Emulated(plain.module)
    with pytest.raises(plain.module.EmulatorError, match="__trap"):
        fresh.gate_stats_(
            *state(2), [torch.ones(1)], [torch.ones(1)], terms,
            torch.tensor(offsets, dtype=torch.int32), 1.0,
        )  # fmt: skip
