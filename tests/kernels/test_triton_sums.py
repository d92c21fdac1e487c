"""abs_histogram and gate_stats_ in Triton's interpreter."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import tolerances
import torch

from psap_kernels import abs_histogram, abs_quantile, gate_stats_, reference, use_backend

pytest.importorskip("triton", reason="triton is a test dependency on Linux")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def forced() -> Iterator[None]:
    with use_backend("triton"):
        yield


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("first", "shift", "bins"),
    [(0, 20, 2048), (1 << 29, 20, 64), (0x3F800000 - (1 << 19), 10, 1000), (0x3F800000, 0, 1)],
)
def test_histogram(dtype, first, shift, bins):
    x = torch.randn(3, 8, 3, 4).to(dtype)
    x[0, 0, 0] = torch.tensor([math.nan, math.inf, -0.0, 1.0], dtype=dtype)
    tensors = [
        x,
        x.to(memory_format=torch.channels_last),
        x[:, 1:4],
        torch.randn(2051).to(dtype),
        x[:0],
        torch.ones(3, dtype=dtype)[1:],
        torch.tensor(2.0, dtype=dtype),
    ]
    scales = torch.tensor([1.0, 0.5, 0.0, 3.7, 1.0, 1.0, 0.5, 9.9] * 2)[:14:2]
    got = abs_histogram(tensors, scales=scales, first=first, shift=shift, bins=bins)
    assert torch.equal(got, reference.abs_histogram(tensors, scales, first, shift, bins))
    assert got.sum(1).tolist() == [t.numel() for t in tensors]


def test_histogram_of_mixed_dtypes_and_of_several_pieces(monkeypatch):
    from psap_kernels.triton import abs_histogram as module

    monkeypatch.setattr(module, "PIECE", 4096)
    tensors = [torch.randn(4100 + 8 * i).to(dtype) for i, dtype in enumerate(DTYPES)]
    scales = torch.ones(4)
    got = abs_histogram(tensors, scales=scales)
    assert torch.equal(got, reference.abs_histogram(tensors, scales, 0, 20, 2048))
    assert torch.equal(got, abs_histogram(tensors, scales=scales))


def test_histogram_of_nothing():
    assert abs_histogram([]).shape == (0, 2050)
    assert abs_histogram([torch.ones(0)], bins=3).tolist() == [[0] * 5]


def test_quantile():
    x = torch.randn(500)
    assert abs_quantile([x], 0.3) == x.abs().sort().values[149].item()


def observe(
    values: list[torch.Tensor], grads: list[torch.Tensor], scale: float = 0.3
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two terms, one, none, and three that share a pair; the wanted d and what was added to it."""
    pairs = len(values)
    lists = [[(0, 0, 1), (pairs - 1, 2, 2)], [(0, 1, 0)], [], [(k % pairs, k, k) for k in range(3)]]
    terms = torch.tensor([t for terms in lists for t in terms], dtype=torch.int32)
    offsets = torch.tensor([0, 2, 3, 3, 6], dtype=torch.int32)
    d, magnitude = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for c, of_channel in enumerate(lists):
        for k, i, j in of_channel:
            product = values[k][i].double() * grads[k][j].double() * scale
            d[c] += product.sum()
            magnitude[c] += product.abs().sum()
    sums, seen = torch.ones(2, 4, dtype=torch.float64), torch.tensor([5, 7])
    gate_stats_(sums, seen, values, grads, terms, offsets, scale=scale)
    assert seen.tolist() == [6, 7]
    assert torch.allclose(sums[1], 1 + (sums[0] - 1) ** 2, rtol=1e-12, atol=0)
    return sums[0] - 1, d, magnitude


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (16,), (24,), (19,), (1040,)], ids=str)
def test_gates(dtype, shape):
    values = [torch.randn(3, *shape).to(dtype) for _ in range(2)]
    grads = [torch.randn(4, *shape).to(dtype) for _ in range(2)]
    got, want, magnitude = observe(values, grads)
    # Beside the sum itself: 1 was added to it and taken away again.
    allowed = tolerances.relative(dtype, math.prod(shape), float32_result=False) * magnitude
    assert bool(((got - want).abs() <= allowed + 2.0**-51).all())


@pytest.mark.parametrize("n", [1, 33])
def test_gates_of_mixed_dtypes_and_any_strides(n):
    values = [torch.randn(3, 2, n, 2).to(dtype) for dtype in DTYPES]
    grads = [torch.randn(3, 2, n, 2).to(dtype) for dtype in DTYPES]
    values[0] = values[0].to(memory_format=torch.channels_last)
    grads[1] = grads[1].transpose(1, 3).contiguous().transpose(1, 3)
    values[3] = values[3].repeat(1, 1, 1, 2)[..., ::2]
    got, want, magnitude = observe(values, grads)
    allowed = tolerances.relative(torch.float32, 4 * n, float32_result=False) * magnitude
    assert bool(((got - want).abs() <= allowed + 2.0**-51).all())


def test_gates_with_rows_of_many_flushes(monkeypatch):
    from psap_kernels.triton import gate_stats_ as module

    monkeypatch.setattr(module, "FLUSH", 1024)
    values = [torch.randn(3, 2600 + 4 * i).to(dtype) for i, dtype in enumerate(DTYPES)]
    grads = [v.flip(1) for v in values]
    got, want, magnitude = observe(values, grads)
    allowed = tolerances.relative(torch.float32, 2600, float32_result=False) * magnitude
    assert bool(((got - want).abs() <= allowed + 2.0**-51).all())


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("n", [1, 20])
def test_one_bad_value_leaves_the_whole_observation_out(bad, n):
    channels = 130 if n == 1 else 3
    value, grad = torch.ones(channels, n), torch.ones(channels, n)
    grad[channels - 1, 0] = bad
    terms = torch.tensor([[0, c, c] for c in range(channels)], dtype=torch.int32)
    offsets = torch.arange(channels + 1, dtype=torch.int32)
    sums, seen = torch.ones(2, channels, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    gate_stats_(sums, seen, [value], [grad], terms, offsets)
    assert seen.tolist() == [0, 1]
    assert sums.eq(1).all()
    grad[channels - 1, 0] = 1
    gate_stats_(sums, seen, [value], [grad], terms, offsets)
    assert seen.tolist() == [1, 1]
    assert sums[0].eq(1 + n).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("term", [[1, 0, 0], [-1, 0, 0], [0, 2, 0], [0, -1, 0], [0, 0, 2]])
@pytest.mark.parametrize("n", [1, 20])
def test_terms_out_of_range_are_not_followed(term, n):
    """The public function refuses them; through the dispatcher the observation is left out."""
    from psap_kernels.triton.gate_stats_ import gate_stats_ as op

    sums, seen = torch.zeros(2, 1, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    terms, offsets = torch.tensor([term], dtype=torch.int32), torch.tensor([0, 1]).int()
    op(sums, seen, [torch.ones(2, n)], [torch.ones(2, n)], terms, offsets, 1.0)
    assert seen.tolist() == [0, 1]
    assert not sums.any()


def test_gates_of_no_channel():
    sums, seen = torch.zeros(2, 0, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    terms, offsets = torch.zeros(0, 3, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    gate_stats_(sums, seen, [], [], terms, offsets)
    assert seen.tolist() == [1, 0]


def test_a_repeated_call_uploads_nothing_and_adds_the_same_bits():
    from psap_kernels.triton import _tables

    values, grads = [torch.randn(3, 2), torch.randn(3)], [torch.randn(3, 2), torch.randn(3)]
    first = observe(values, grads)[0]
    before = _tables.upload.cache_info().misses
    assert torch.equal(observe(values, grads)[0], first)
    assert _tables.upload.cache_info().misses == before


X, SCALES = torch.ones(2, 3), torch.ones(1)
SUMS, SEEN = torch.zeros(2, 1, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
TERMS, OFFSETS = torch.zeros(1, 3, dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)


@pytest.mark.parametrize(
    ("op", "arguments", "match"),
    [
        ("abs_histogram", ([X], torch.ones(2), 0, 20, 8), r"scales must be float32 \[L\]"),
        ("abs_histogram", ([X], SCALES.double(), 0, 20, 8), r"scales must be float32 \[L\]"),
        ("abs_histogram", ([X.int()], SCALES, 0, 20, 8), "tensors must be of a float dtype"),
        ("abs_histogram", ([X], SCALES, -1, 20, 8), "first must be 0 to"),
        ("abs_histogram", ([X], SCALES, 0, 31, 8), "shift must be 0 to 30"),
        ("abs_histogram", ([X], SCALES, 0, 20, 4096), "bins must be 1 to 2048"),
        ("abs_histogram", ([X.to("meta")], SCALES, 0, 20, 8), "tensors are on cpu, meta"),
        ("gate_stats_", (SUMS, SEEN, [X], [], TERMS, OFFSETS, 1.0), "as many grads"),
        ("gate_stats_", (SUMS, SEEN, [X], [X.half()], TERMS, OFFSETS, 1.0), "one float dtype"),
        ("gate_stats_", (SUMS, SEEN, [X], [X[:, :2]], TERMS, OFFSETS, 1.0), "rows of a gradient"),
        ("gate_stats_", (SUMS, SEEN.int(), [X], [X], TERMS, OFFSETS, 1.0), "wrong dtype or shape"),
        ("gate_stats_", (SUMS, SEEN, [X], [X], TERMS[:, :2], OFFSETS, 1.0), "wrong dtype or shape"),
        ("gate_stats_", (SUMS, SEEN, [X], [X.to("meta")], TERMS, OFFSETS, 1.0), "on cpu, meta"),
    ],
)
def test_the_kernels_check_too(op, arguments, match):
    from psap_kernels import _load

    with pytest.raises(RuntimeError, match=match):
        _load.triton_op(op)(*arguments)
