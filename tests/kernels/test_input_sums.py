"""layer_stats with per_input: sums per input channel, and filters that are read in pieces."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import threads
import tolerances
import torch

from psap_kernels import layer_stats

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# More than two pieces of 65,536 elements, with a rest that fills no vector.
LONG = (3, 7, 2, 11_003)


def make(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def orders(x: torch.Tensor) -> list[torch.Tensor]:
    """The same values with dimension 1 outermost, in the middle and innermost, and with gaps."""
    middle = x.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)
    last = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    first = x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    gaps = torch.full((*x.shape[:-1], 2 * x.shape[-1]), math.nan, dtype=x.dtype)[..., ::2]
    return [x, middle, last, first, gaps.copy_(x)]


def check_inputs(weight: torch.Tensor, grad: torch.Tensor, got: torch.Tensor) -> None:
    terms = (weight.double() * grad.double()).transpose(0, 1).flatten(1).numpy()
    want = np.array([oracle.add(row) for row in terms])
    length = weight.numel() // weight.shape[1]
    allowed = tolerances.relative(weight.dtype, length, float32_result=True)
    error = np.abs(got.double().numpy() - want)
    np.testing.assert_array_less(error, allowed * np.abs(terms).sum(1) + 1e-30)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_order_of_dimensions(backend, dtype):
    w, g = make((5, 6, 3, 9), dtype), make((5, 6, 3, 9), dtype, seed=1)
    pairs = [(a, b) for a in orders(w) for b in orders(g)]
    stats = layer_stats([a for a, _ in pairs], [b for _, b in pairs], per_input=True)
    for i in range(len(pairs)):
        check_inputs(w, g, stats.layer(i).input_weight_grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_filters_of_any_strides(backend, dtype):
    w, g = make(LONG, dtype), make(LONG, dtype, seed=1)
    want = layer_stats([w], [g]).filter_sums
    for a, b in zip(orders(w), [*orders(g)[1:], g], strict=True):
        stats = layer_stats([a], [b], per_input=True)
        check_inputs(w, g, stats.input_weight_grad)
        torch.testing.assert_close(stats.weight_sq, want[1], rtol=1e-6, atol=0)
        torch.testing.assert_close(stats.weight_grad_abs, want[4], rtol=1e-6, atol=0)


def test_nonfinite_values_of_long_filters_with_gaps(backend):
    w, g = orders(make(LONG, torch.float32))[-1], make(LONG, torch.float32, seed=1)
    w[1, 6, 1, -1], g[2, 3, 0, 5] = math.nan, math.inf
    stats = layer_stats([w], [g], per_input=True)
    assert stats.nonfinite_weight.tolist() == [0, 1, 0]
    assert stats.nonfinite_grad.tolist() == [0, 0, 1]
    assert stats.input_weight_grad.isfinite().tolist() == [True] * 3 + [False] + [True] * 2 + [
        False
    ]


def test_many_filters_of_one_element(backend):
    w = torch.full((70_001, 1), 0.1)
    got = layer_stats([w], [w], per_input=True).input_weight_grad
    check_inputs(w, w, got)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_threads_and_instructions(compiled, dtype, monkeypatch):
    shapes = [(300, 20, 3, 3), (1, 200_000), (40, 70), (3, 9), LONG]
    weights = [make(shape, dtype) for shape in shapes]
    grads = [make(shape, dtype, seed=1) for shape in shapes]
    weights[0] = weights[0].to(memory_format=torch.channels_last)
    tau = torch.full((len(shapes),), 0.3)
    plain = torch.ops.psap.layer_stats(weights, grads, tau)
    results = []
    for capability in ("default", ""):
        monkeypatch.setenv("PSAP_CPU_CAPABILITY", capability)
        for n in (1, 2, 5):
            with threads.using(n):
                results.append(torch.ops.psap.layer_stats(weights, grads, tau, True))
    for result in results:
        for got, want in zip(result, results[0], strict=True):
            assert torch.equal(got, want)
        # Asking for more changes nothing else.
        for got, want in zip(result[:4], plain[:4], strict=True):
            assert torch.equal(got, want)
