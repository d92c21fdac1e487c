"""Every CUDA kernel body, run on the CPU, against the reference."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import emulation
import pytest
import torch
from emulation import Emulated
from test_gate_stats import case, state
from test_layer_stats import DTYPES, SHAPES, check, make, strided_copies

from psap_kernels import LayerStats, reference


@pytest.fixture(params=range(5), ids=["forward", "reverse", "warps", "warps-reverse", "random"])
def gpu(request: pytest.FixtureRequest) -> Iterator[Emulated]:
    emulation.require()
    module = emulation.emulator()
    module.set_schedule(request.param)
    yield Emulated(module)
    module.set_schedule(0)


def stats(gpu: Emulated, weights, grads, tau, per_input=False) -> LayerStats:
    out = gpu.layer_stats(weights, grads or [], tau, per_input)
    return LayerStats(*out[:4], tuple(w.shape for w in weights), out[4] if per_input else None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_stats(gpu, dtype):
    weights = [make(shape, dtype) for shape in SHAPES]
    grads = [make(shape, dtype, seed=1) for shape in SHAPES]
    tau = torch.linspace(0, 1.5, len(SHAPES))
    check(weights, grads, tau, stats(gpu, weights, grads, tau))


def test_layer_stats_without_gradients(plain):
    weights, tau = [make(shape, torch.float32) for shape in SHAPES], torch.full((len(SHAPES),), 0.5)
    check(weights, None, tau, stats(plain, weights, None, tau))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_stats_of_any_strides(plain, dtype):
    w, g = make((6, 5, 3, 9), dtype), make((6, 5, 3, 9), dtype, seed=1)
    pairs = [(a, b) for a in strided_copies(w).values() for b in strided_copies(g).values()]
    weights, grads = [p[0] for p in pairs], [p[1] for p in pairs]
    tau = torch.full((len(pairs),), 0.7)
    check(weights, grads, tau, stats(plain, weights, grads, tau))


@pytest.mark.parametrize("skew", range(9))
def test_layer_stats_wherever_filters_begin(plain, skew):
    for dtype in DTYPES:
        for other in (skew, 0):
            w = make((9 * 37 + skew,), dtype)[skew:].view(9, 37)
            g = make((9 * 37 + other,), dtype, seed=1)[other:].view(9, 37)
            tau = torch.tensor([0.5])
            check([w], [g], tau, stats(plain, [w], [g], tau))


def test_layer_stats_of_long_filters(gpu):
    w, g = make((2, 70_001), torch.float32), make((2, 70_001), torch.float32, seed=1)
    tau = torch.tensor([0.3, 0.3, 0.3])
    weights, grads = [w[:, :20], w, w[:1, 1:9000]], [g[:, :20], g, g[:1, 1:9000]]
    check(weights, grads, tau, stats(gpu, weights, grads, tau))


@pytest.mark.parametrize("layers", [1, 30])
def test_layer_stats_of_many_layers_by_value_and_by_table(plain, layers):
    weights = [make((1 + i % 4, 5), DTYPES[i % 4], seed=i) for i in range(layers)]
    tau = torch.full((layers,), 0.4)
    check(weights, weights, tau, stats(plain, weights, weights, tau))


def test_layer_stats_counts_what_is_not_finite(gpu):
    for dtype in DTYPES:
        w, g = make((9, 300), dtype), make((9, 300), dtype, seed=1)
        w[2, 299], w[2, 0], g[8, 31], g[0, 5] = math.nan, math.inf, -math.inf, math.nan
        result = stats(gpu, [w], [g], torch.tensor([0.5]))
        assert result.nonfinite_weight.tolist() == [0, 0, 2, 0, 0, 0, 0, 0, 0]
        assert result.nonfinite_grad.tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 1]
        assert result.layer_counts[0, 1:].tolist() == [2, 2]
        assert torch.equal(result.below_tau, (w.double().abs() < 0.5).sum(1).int())


def test_layer_stats_of_empty_layers(plain):
    weights = [torch.empty(0, 3), torch.ones(2, 3), torch.empty(4, 0), torch.empty(0)]
    tau = torch.ones(4)
    check(weights, weights, tau, stats(plain, weights, weights, tau))


def test_layer_stats_has_the_same_bits_in_every_order_of_threads(plain):
    shapes = [(40, 3, 3, 3), (2, 70_001), (300, 7)]
    weights = [make(s, torch.float32) for s in shapes]
    grads = [make(s, torch.float32, seed=1) for s in shapes]
    results = []
    for schedule in range(plain.module.SCHEDULES):
        plain.module.set_schedule(schedule)
        results.append(plain.layer_stats(weights, grads, torch.ones(3), True))
    plain.module.set_schedule(0)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_per_input_channel(gpu, dtype):
    shapes = [(7,), (3, 8), (40, 3, 3, 3), (9, 70, 1, 1), (0, 4, 3)]
    weights = [make(s, dtype) for s in shapes]
    grads = [make(s, dtype, seed=1) for s in shapes]
    weights[2] = weights[2].contiguous(memory_format=torch.channels_last)
    got = gpu.layer_stats(weights, grads, torch.ones(5), True)[4]
    want = reference.layer_stats(weights, grads, torch.ones(5), True)[4]
    torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_abs_histogram(gpu, dtype):
    tensors = [
        make((3, 5, 2, 2), dtype).contiguous(memory_format=torch.channels_last),
        make((301,), dtype)[::3],
        torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, 3e38]).to(dtype),
        make((7, 900), dtype)[:, 1:9],
        torch.empty(0, dtype=dtype),
        torch.tensor(0.5, dtype=dtype),
        make((66_001,), dtype)[1:] if dtype == torch.float32 else make((99,), dtype),
    ]
    scales = torch.tensor([1.0, 0.3, 1.0, 2.5, 1.0, 0.0, 1.0])
    for first, shift, bins in ((0, 20, 2048), (1 << 29, 18, 100), (0x3F800000, 0, 1)):
        got = gpu.abs_histogram(tensors, scales, first, shift, bins)
        assert torch.equal(got, reference.abs_histogram(tensors, scales, first, shift, bins))


KINDS = [torch.uint8, torch.float16, torch.float32, torch.float64, torch.complex128]


def fill(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(2, 120, shape).to(dtype)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_shrink(gpu, dtype):
    x = fill((6, 5, 3, 3), dtype)
    tensors = [
        x,
        x.contiguous(memory_format=torch.channels_last),
        fill((6, 5, 1, 1), dtype),
        fill((6, 5, 2, 3, 3), dtype).contiguous(memory_format=torch.channels_last_3d),
        fill((6, 5), dtype),
        fill((6,), dtype),
        fill((6, 5, 4), dtype)[:, :, :2].contiguous(),
        fill((7, 5, 2, 2), dtype)[1:],
        fill((31,), dtype)[1:].view(6, 5),
    ]
    keep0, keep1 = torch.tensor([5, 0, 0, 3]), torch.tensor([4, 1])
    for a, b in (
        (keep0, keep1),
        (torch.arange(6), torch.arange(5)),
        (keep0[:0], keep1),
        (keep0, keep1[:0]),
        (torch.arange(12)[::2] // 2, torch.tensor([0, 2, 4, 1])),
    ):
        a, b = [a] * len(tensors), [b] * len(tensors)
        got, want = gpu.shrink(tensors, a, b), reference.shrink(tensors, a, b)
        for i, (x, y) in enumerate(zip(got, want, strict=True)):
            assert torch.equal(x, y), i
            assert x.stride() == y.stride(), i


def test_shrink_of_long_rows_and_many_tensors(plain):
    wide = fill((3, 9000, 2), torch.float32)
    keep = torch.randperm(9000)[:7001]
    got = plain.shrink([wide], [torch.tensor([2, 0])], [keep])[0]
    assert torch.equal(got, wide[[2, 0]][:, keep])
    many = [fill((2 + i % 3, 3), torch.float32) for i in range(400)]
    first, second = [torch.tensor([1, 0])] * 400, [torch.tensor([2])] * 400
    for got, want in zip(
        plain.shrink(many, first, second), reference.shrink(many, first, second), strict=True
    ):
        assert torch.equal(got, want)


def test_an_index_out_of_range_traps(plain):
    x = [torch.ones(3, 4)]
    for a, b in (([3], [0]), ([-1], [0]), ([0], [4]), ([0], [-1])):
        with pytest.raises(plain.module.EmulatorError, match="__trap"):
            plain.shrink(x, [torch.tensor(a)], [torch.tensor(b)])
    with pytest.raises(plain.module.EmulatorError, match="__trap"):
        plain.restore_filters_(x, [torch.tensor([3])], [torch.ones(1, 4)])


def rows_cases(dtype: torch.dtype) -> list[torch.Tensor]:
    wide = fill((5, 3, 4, 4), dtype)
    return [
        fill((5, 3, 3, 3), dtype),
        fill((5, 3, 3, 3), dtype).contiguous(memory_format=torch.channels_last),
        fill((5,), dtype),
        wide[:, :, ::2, 1:],
        fill((3, 5, 2), dtype).movedim(1, 0),
        fill((5 * 7 + 1,), dtype)[1:].view(5, 7),
        fill((5, 20_000), dtype),
        fill((5, 0), dtype),
    ]


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_zero_filters(gpu, dtype):
    keep = torch.tensor([True, False, True, False, False])
    got, want = rows_cases(dtype), []
    want = [x.clone() for x in got]
    gpu.zero_filters_(got, [keep] * len(got))
    reference.zero_filters_(want, [keep] * len(want))
    for i, (x, y) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(x, y), i
    assert (rows_cases(dtype)[0] != 0).all()


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_restore_filters(gpu, dtype):
    rows = torch.tensor([4, 0, 2])
    got = rows_cases(dtype)
    want = [x.clone() for x in got]
    saved = [fill((3, *x.shape[1:]), dtype) for x in got]
    saved[2] = fill((4,), dtype)[1:]
    gpu.restore_filters_(got, [rows] * len(got), saved)
    reference.restore_filters_(want, [rows] * len(want), saved)
    for i, (x, y) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(x, y), i


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gate_stats(gpu, dtype):
    values, grads, terms, offsets = case(dtype)
    got, want = state(4), state(4)
    for scale in (0.5, -2.0):
        gpu.gate_stats_(*got, values, grads, terms, offsets, scale)
        reference.gate_stats_(*want, values, grads, terms, offsets, scale)
    torch.testing.assert_close(got[0], want[0], rtol=1e-12, atol=1e-12)
    assert got[1].tolist() == [2, 0]
    grads[2][0, 0, 0] = math.nan
    before = got[0].clone()
    gpu.gate_stats_(*got, values, grads, terms, offsets, 1.0)
    assert torch.equal(got[0], before)
    assert got[1].tolist() == [2, 1]
    grads[2][0, 0, 0] = 1
    gpu.gate_stats_(*got, values, grads, terms, offsets, 1.0)
    assert got[1].tolist() == [3, 1]


def test_gate_stats_of_many_channels_and_terms(gpu):
    channels, per = 21, 70
    values, grads = [torch.randn(90), torch.randn(90, 40)], [torch.randn(90), torch.randn(90, 40)]
    terms = torch.randint(0, 90, (channels * per, 3), dtype=torch.int32)
    terms[:, 0] %= 2
    offsets = torch.arange(0, channels * per + 1, per, dtype=torch.int32)
    got, want = state(channels), state(channels)
    gpu.gate_stats_(*got, values, grads, terms, offsets, 1.0)
    reference.gate_stats_(*want, values, grads, terms, offsets, 1.0)
    torch.testing.assert_close(got[0], want[0], rtol=1e-11, atol=1e-11)


def test_gate_stats_traps_and_counts_nothing(plain):
    values, grads, terms, offsets = case(torch.float32)
    for bad in ((4, 0, 0), (0, 6, 0), (0, 0, -1)):
        terms[0] = torch.tensor(bad, dtype=torch.int32)
        with pytest.raises(plain.module.EmulatorError, match="__trap"):
            Emulated(plain.module).gate_stats_(*state(4), values, grads, terms, offsets, 1.0)
    sums, seen = state(0)
    none = torch.zeros(0, 3, dtype=torch.int32)
    plain.gate_stats_(sums, seen, [], [], none, torch.zeros(1, dtype=torch.int32), 1.0)
    assert seen.tolist() == [1, 0]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("tests", [Path(__file__).name, "test_emu_stats.py"])
def test_under_address_and_undefined_behaviour_sanitizers(tests):
    """All of the above, and test_emu_stats.py, in a process with an emulator built for it."""
    emulation.require()
    library = emulation.build(emulation.ROOT / "csrc", sanitize=True)
    done = emulation.run_sanitized(
        "import sys, pytest, emulation, pathlib\n"
        f"library = emulation.load(pathlib.Path({str(library)!r}))\n"
        "emulation.emulator = lambda: library\n"
        f"sys.exit(pytest.main(['-q', '-x', '-p', 'no:xdist', '-p', 'no:cacheprovider',"
        f" {str(Path(__file__).with_name(tests))!r}, '-k',"
        " 'not sanitizers and not reverse and not random and not bits and not 300 and not many']))"
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
