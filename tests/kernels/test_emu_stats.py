"""layer_stats and abs_histogram on the emulator: how work is split, what is not finite, tables."""

from __future__ import annotations

import math

import pytest
import torch
from emulation import Emulated
from test_layer_stats import DTYPES, check, make

from psap_kernels import LayerStats, reference


def stats(plain: Emulated, weights, grads, tau) -> LayerStats:
    out = plain.layer_stats(weights, grads or [], tau)
    return LayerStats(*out[:4], tuple(w.shape for w in weights))


def flags(of: torch.Tensor) -> list[bool]:
    return of.isfinite().tolist()


@pytest.mark.parametrize(
    "length", [1, 4, 5, 16, 17, 64, 65, 128, 129, 2048, 2049, 32768, 32769, 65536, 65537]
)
def test_lengths_around_the_borders_of_the_split(plain, length):
    w, g = make((3, length), torch.float32), make((3, length), torch.float32, seed=1)
    plain.module.set_schedule(length % plain.module.SCHEDULES)
    try:
        check([w], [g], torch.tensor([0.3]), stats(plain, [w], [g], torch.tensor([0.3])))
    finally:
        plain.module.set_schedule(0)


@pytest.mark.parametrize("filters", [1, 2, 31, 32, 33, 255, 256, 257, 300])
@pytest.mark.parametrize("length", [1, 7, 9, 30, 60])
def test_any_number_of_filters_in_a_warp(plain, filters, length):
    w = make((filters, length), torch.float32)
    check([w], None, torch.tensor([0.3]), stats(plain, [w], None, torch.tensor([0.3])))


@pytest.mark.parametrize("shape", [(5, 3), (3, 50), (2, 300), (2, 2100), (1, 33_000)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wherever_weights_and_gradients_begin(plain, dtype, shape):
    """Each of the two at every distance from a multiple of 16 bytes."""
    steps = 16 // dtype.itemsize
    weights, grads, n = [], [], math.prod(shape)
    for a in range(steps):
        for b in {a, (a + 1) % steps}:
            weights.append(make((n + a,), dtype)[a:].view(shape))
            grads.append(make((n + b,), dtype, seed=1)[b:].view(shape))
    tau = torch.full((len(weights),), 0.5)
    check(weights, grads, tau, stats(plain, weights, grads, tau))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_filters_of_many_blocks(plain, dtype):
    weights = [make((2, 33_001), dtype), make((9, 4), dtype), make((1, 70_003), dtype)]
    weights.append(make((33_000, 2), dtype).t())
    grads = [w.flip(0) for w in weights]
    tau = torch.full((4,), 0.3)
    check(weights, grads, tau, stats(plain, weights, grads, tau))


@pytest.mark.parametrize("layers", [60, 61, 505])
def test_many_layers_by_value_and_by_table(plain, layers):
    """60 of them fill an argument of 4 KB, 504 one of 32 KB."""
    weights = [make((1 + i % 3, 5), DTYPES[i % 4], seed=i) for i in range(layers)]
    tau = torch.full((layers,), 0.4)
    check(weights, weights, tau, stats(plain, weights, weights, tau))


@pytest.mark.parametrize("layers", [5, 25, 170])
def test_layouts_and_input_channels_by_value_and_by_table(plain, layers):
    """A layer with gaps takes 144 bytes, and as many for its input channels."""
    weights = [make((1 + i % 3, 10), DTYPES[i % 4], seed=i)[:, i % 3 :: 2] for i in range(layers)]
    tau = torch.full((layers,), 0.4)
    result = plain.layer_stats(weights, weights, tau, True)
    check(weights, weights, tau, LayerStats(*result[:4], tuple(w.shape for w in weights)))
    want = reference.layer_stats(weights, weights, tau, True)[4]
    torch.testing.assert_close(result[4], want, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, -math.inf], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [3, 27, 300, 3000, 33_000])
def test_what_is_not_finite_is_counted(plain, dtype, bad, length):
    w, g = make((4, length), dtype), make((4, length), dtype, seed=1)
    w[1, 0] = w[1, length - 1] = bad
    g[3, length // 2] = bad
    result = stats(plain, [w], [g], torch.tensor([10.0]))
    counts = [[length, length - 2, length, length], [0, 2, 0, 0], [0, 0, 0, 1]]
    assert result.filter_counts.tolist() == counts
    assert flags(result.weight_abs) == [True, False, True, True]
    assert flags(result.grad_abs) == [True, True, True, False]
    assert result.layer_counts.tolist() == [[4 * length - 2, 2, 1]]
    assert not result.layer_sums.isfinite().any()


def test_overflow_is_not_counted_as_such(plain):
    w = torch.full((2, 300), 3e38)
    result = stats(plain, [w], [w], torch.ones(1))
    assert result.weight_sq.isinf().all()
    assert result.filter_counts[1:].tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_values_of_16_bits(plain, dtype):
    w = torch.arange(0, 1 << 16, 3, dtype=torch.int32).to(torch.int16).view(dtype)
    w = w[w.isfinite()].reshape(-1, 1)
    result = stats(plain, [w], None, torch.zeros(1))
    assert torch.equal(result.weight_abs, w[:, 0].float().abs())


def test_tau_is_strict_and_may_be_strided(plain):
    w = torch.tensor([[0.5, -0.5, 0.25, -0.0]])
    for tau, count in ((0.5, 2), (0.0, 0), (math.nan, 0), (-1.0, 0)):
        assert stats(plain, [w], None, torch.tensor([tau])).below_tau.item() == count
    found = stats(plain, [w, w], None, torch.tensor([0.5, 9.0, 0.1, 9.0])[::2])
    assert found.below_tau.tolist() == [2, 1]


def test_empty_layers_and_filters(plain):
    shapes = [(0, 3, 3, 3), (1, 2), (2, 0, 3), (0,), (0, 40_000), (3, 0), (0, 2500)]
    weights = [torch.ones(shape) for shape in shapes]
    tau = torch.full((len(shapes),), 2.0)
    result = plain.layer_stats(weights, weights, tau, True)
    check(weights, weights, tau, LayerStats(*result[:4], tuple(map(torch.Size, shapes))))
    assert torch.equal(result[4], reference.layer_stats(weights, weights, tau, True)[4])
    none = plain.layer_stats(weights[:1], [], tau[:1])
    assert none[2].tolist() == [[0.0] * 7] and none[3].tolist() == [[0] * 3]


def test_the_bits_of_a_layer_do_not_depend_on_the_others(plain):
    w, g = make((20, 300), torch.float32), make((20, 300), torch.float32, seed=1)
    other, tau = make((7, 2500), torch.float16), torch.ones(2)
    alone = plain.layer_stats([w], [g], tau[:1])
    second = plain.layer_stats([other, w], [other, g], tau, True)
    assert torch.equal(alone[0], second[0][:, 7:])
    assert torch.equal(alone[2][0], second[2][1])


def test_more_strides_than_kernels_read_are_refused_by_the_plan(plain):
    w = torch.zeros(2, *[4] * 6)[:, ::2, ::2, ::2, ::2, ::2, ::2]
    with pytest.raises(RuntimeError, match="too many strides"):
        plain.layer_stats([w], [], torch.ones(1))
    with pytest.raises(RuntimeError, match="too many strides"):
        plain.abs_histogram([w], torch.ones(1), 0, 20, 2048)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("first", [0, 1, 1 << 29, (1 << 31) - 1])
def test_zeros_and_what_the_range_leaves_out(plain, dtype, first):
    """They are counted apart: all of them, some, and none, with pieces that end anywhere."""
    x = make((40_003,), dtype)
    some = torch.where(torch.arange(40_003) % 3 > 0, x, -0.0 * x)
    tensors = [torch.zeros(16_385, dtype=dtype), some, x[1:16_385], -x.abs()]
    scales = torch.tensor([1.0, 1.0, 0.0, 3.0])
    for shift, bins in ((20, 2048), (0, 1), (24, 7)):
        got = plain.abs_histogram(tensors, scales, first, shift, bins)
        assert torch.equal(got, reference.abs_histogram(tensors, scales, first, shift, bins))
        assert got.sum(1).tolist() == [t.numel() for t in tensors]


def test_histograms_of_many_tensors(plain):
    tensors = [make((1 + i % 7, 3), DTYPES[i % 4], seed=i) for i in range(121)]
    scales = torch.linspace(0.1, 3, 121)
    got = plain.abs_histogram(tensors, scales, 0, 24, 127)
    assert torch.equal(got, reference.abs_histogram(tensors, scales, 0, 24, 127))
