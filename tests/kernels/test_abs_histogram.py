from __future__ import annotations

import math

import numpy as np
import pytest
import threads
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psap_kernels import abs_histogram, abs_quantile

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
X = torch.ones(2, 3)


def keys(x: torch.Tensor, scale: float) -> np.ndarray:
    """Bit patterns of float32 magnitudes, from the definition, in NumPy."""
    with np.errstate(over="ignore", invalid="ignore"):
        value = np.abs(x.double().numpy().astype(np.float32)) * np.float32(scale)
    value = np.abs(value).reshape(-1)
    return np.where(np.isnan(value), 2**31 - 1, value.view(np.int32).astype(np.int64))


def expected(x: torch.Tensor, scale: float, first: int, shift: int, bins: int) -> np.ndarray:
    column = np.zeros(bins + 2, dtype=np.int64)
    for key in keys(x, scale):
        if key < first:
            column[0] += 1
        else:
            column[1 + min((key - first) >> shift, bins)] += 1
    return column


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "first, shift, bins", [(0, 20, 2048), (1 << 29, 18, 100), (0x3F800000, 0, 1), (0, 30, 1)]
)
def test_against_the_definition(backend, dtype, first, shift, bins):
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e-40, 3e38])
    tensors = [
        torch.randn(3, 5, 2, 2).to(dtype).contiguous(memory_format=torch.channels_last),
        torch.randn(301).to(dtype)[::3],
        special.to(dtype),
        torch.randn(7, 70_000).to(dtype)[:, :9],
        torch.tensor(0.5, dtype=dtype),
        torch.empty(0, 3, dtype=dtype),
    ]
    scales = torch.tensor([1.0, 0.3, 1.0, 2.5, 0.0, 1.0])
    counts = abs_histogram(tensors, scales=scales, first=first, shift=shift, bins=bins)
    assert counts.dtype == torch.int64
    for tensor, scale, got in zip(tensors, scales.tolist(), counts, strict=True):
        np.testing.assert_array_equal(got.numpy(), expected(tensor, scale, first, shift, bins))


def test_long_tensor_and_threads(backend):
    x = torch.randn(300_000)
    want = torch.from_numpy(np.bincount(keys(x, 1.0) >> 20, minlength=2048))
    for count in (1, 3):
        with threads.using(count):
            counts = abs_histogram([x, x[:1], x])
        assert torch.equal(counts[0, 1:-1], want)
        assert torch.equal(counts[2], counts[0])
        assert counts[1].sum() == 1


def test_long_tensors_with_gaps(backend):
    x = torch.randn(2, 150_001)
    want = abs_histogram([x])
    for strided in (x.t(), torch.stack([x, -x], 2)[..., 1], torch.stack([x, x], 1)[:, 0]):
        assert torch.equal(abs_histogram([strided]), want)


@pytest.mark.parametrize("count", [4095, 4096, 4097, 65_537])
def test_lengths_about_a_table_and_a_piece(backend, count):
    x = torch.randn(count)
    want = torch.from_numpy(np.bincount(keys(x, 1.0) >> 20, minlength=2048))
    assert torch.equal(abs_histogram([x, x])[1, 1:-1], want)


def test_ten_thousand_tensors(backend):
    counts = abs_histogram(list(torch.arange(10_000.0).unbind(0)), first=1, shift=20, bins=2047)
    assert counts.sum(1).eq(1).all()
    assert counts[0, 0] == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_counts_beyond_int32(compiled):
    # One element in memory, more than 2^32 of them to read.
    x = torch.ones(1).expand(2**16 + 1, 2**16)
    counts = abs_histogram([x], first=0, shift=30, bins=1)
    assert counts.tolist() == [[0, x.numel(), 0]]


@settings(max_examples=60)
@given(
    st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40),
    st.floats(0, 1),
)
def test_quantile_is_exact(values, q):
    x = torch.tensor(values, dtype=torch.float32)
    want = np.quantile(np.abs(x.numpy()), q, method="inverted_cdf")
    assert abs_quantile([x], q) == want


@pytest.mark.parametrize("q", [0.0, 0.3, 0.5, 0.99, 1.0])
def test_quantile_of_many_tensors(backend, q):
    tensors = [
        torch.randn(40, 9),
        torch.randn(1000).half(),
        torch.empty(0),
        torch.randn(5).double(),
    ]
    scales = torch.tensor([1.0, 0.25, 7.0, 3.0])
    together = np.concatenate(
        [
            keys(t, s).astype(np.int32).view(np.float32)
            for t, s in zip(tensors, scales.tolist(), strict=True)
        ]
    )
    assert abs_quantile(tensors, q, scales=scales) == np.quantile(
        together, q, method="inverted_cdf"
    )


def test_quantile_of_special_values(backend):
    assert abs_quantile([torch.full((9,), -2.5)], 0.5) == 2.5
    assert abs_quantile([torch.tensor(-3.0)], 0.0) == 3.0
    assert abs_quantile([torch.tensor([1.0, -math.inf])], 1.0) == math.inf
    assert math.isnan(abs_quantile([torch.tensor([1.0, math.nan])], 1.0))
    assert abs_quantile([torch.tensor([1e300], dtype=torch.float64)], 1.0) == math.inf


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        ({"tensors": X}, TypeError, r"tensors is a Tensor, wanted a list"),
        ({"tensors": [X.int()]}, TypeError, r"tensors\[0\] is torch.int32"),
        ({"tensors": [X, X.to("meta")]}, ValueError, r"tensors\[1\] is on meta, wanted cpu"),
        ({"tensors": [X], "scales": torch.ones(2)}, ValueError, r"scales has shape \[2\]"),
        ({"tensors": [X], "scales": torch.ones(1).double()}, TypeError, r"scales is torch.float64"),
        ({"tensors": [X], "first": -1}, ValueError, r"first is -1, wanted 0 to 2147483647"),
        ({"tensors": [X], "shift": 31}, ValueError, r"shift is 31, wanted 0 to 30"),
        ({"tensors": [X], "bins": 0}, ValueError, r"bins is 0, wanted 1 to 2048"),
        ({"tensors": [X], "bins": 4000}, ValueError, r"bins is 4000, wanted 1 to 2048"),
        ({"tensors": [X], "bins": 1.5}, TypeError, r"bins is a float, wanted an int"),
    ],
)
def test_wrong_arguments(backend, arguments, error, match):
    with pytest.raises(error, match=match):
        abs_histogram(**arguments)


def test_wrong_quantiles(backend):
    with pytest.raises(ValueError, match=r"q is 1.5, wanted 0 <= q <= 1"):
        abs_quantile([X], 1.5)
    with pytest.raises(ValueError, match=r"q is nan"):
        abs_quantile([X], math.nan)
    with pytest.raises(ValueError, match=r"tensors hold no element"):
        abs_quantile([torch.empty(0)], 0.5)


def test_no_tensors(backend):
    assert abs_histogram([]).shape == (0, 2050)
