"""layer_stats in Triton's interpreter: every body, dtype and layout; few filters: it is slow."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import oracle
import pytest
import tolerances
import torch

from psap_kernels import LayerStats, layer_stats, reference, use_backend

pytest.importorskip("triton", reason="triton is a test dependency on Linux")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def forced() -> Iterator[None]:
    with use_backend("triton"):
        yield


def make(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + math.prod(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def check(
    weights: list[torch.Tensor],
    grads: list[torch.Tensor] | None,
    tau: torch.Tensor,
    stats: LayerStats,
) -> None:
    for i, weight in enumerate(weights):
        want = oracle.layer(weight, grads[i] if grads else None, tau[i].item())
        got = stats.layer(i)
        length = weight.shape[1:].numel()
        allowed = tolerances.relative(weight.dtype, length, float32_result=True)
        error = np.abs(got.filter_sums.double().numpy() - want.sums[:6])
        np.testing.assert_array_less(error, allowed * want.magnitudes[:6] + 1e-300)
        np.testing.assert_array_equal(got.filter_counts.numpy(), want.counts)
        allowed = tolerances.relative(weight.dtype, weight.numel(), float32_result=False)
        error = np.abs(got.layer_sums[0].numpy() - [oracle.add(row) for row in want.sums])
        np.testing.assert_array_less(error, allowed * want.magnitudes.sum(1) + 1e-300)
        np.testing.assert_array_equal(got.layer_counts[0].numpy(), want.counts.sum(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_grads", [True, False], ids=["wg", "w"])
def test_every_body_against_the_oracle(dtype, with_grads):
    """Aligned and odd, one piece and several, one dimension, nothing."""
    shapes = [(2, 16), (2, 5, 3, 3), (3,), (1, 8208), (1, 8195), (0, 3), (1, 0, 3)]
    weights = [make(*shape, dtype=dtype) for shape in shapes]
    grads = [make(*shape, dtype=dtype, seed=1) for shape in shapes] if with_grads else None
    tau = torch.linspace(0.1, 1.5, len(shapes))
    stats = layer_stats(weights, grads, tau=tau)
    check(weights, grads, tau, stats)
    assert stats.filter_sums.dtype == torch.float32
    assert stats.layer_counts.dtype == torch.int64


def layouts(x: torch.Tensor) -> list[torch.Tensor]:
    """The same values dense, dense in another order, with gaps, transposed, off by one."""
    gaps = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), math.nan)[..., 1::2]
    shifted = torch.full((x.numel() + 1,), math.nan)[1:].view(x.shape)
    return [
        x,
        x.to(memory_format=torch.channels_last),
        gaps.copy_(x),
        x.transpose(0, 1).contiguous().transpose(0, 1),
        shifted.copy_(x),
    ]


def test_any_strides():
    w, g = layouts(make(2, 4, 2, 2)), layouts(make(2, 4, 2, 2, seed=1))
    pairs = [(w[i], g[j]) for i, j in ((1, 1), (0, 1), (1, 0), (2, 2), (3, 3), (4, 0), (0, 4))]
    weights, grads = [p[0] for p in pairs], [p[1] for p in pairs]
    tau = torch.tensor([0.7, 9.0] * len(pairs))[::2]
    check(weights, grads, tau, layer_stats(weights, grads, tau=tau))


def test_rows_of_a_wider_tensor_and_expanded_ones():
    wide = make(3, 40)
    weights = [wide[:, 8:24], wide[:, 3:9], make(1, 6).expand(3, 6)]
    tau = torch.full((3,), 0.4)
    check(weights, weights, tau, layer_stats(weights, weights, tau=tau))


def test_mixed_dtypes_and_filters_of_many_flushes(monkeypatch):
    from psap_kernels.triton import layer_stats as module

    monkeypatch.setattr(module, "FLUSH", 1024)
    weights = [make(1, 2100 + 4 * i, dtype=dtype) for i, dtype in enumerate(DTYPES)]
    grads = [w.flip(1) for w in weights]
    tau = torch.full((4,), 0.5)
    check(weights, grads, tau, layer_stats(weights, grads, tau=tau))


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nonfinite_values_are_counted(dtype):
    w, g = make(3, 3, 9, dtype=dtype), make(3, 3, 9, dtype=dtype, seed=1)
    w[1].view(-1)[[0, 8, 26]] = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype)
    g[2].view(-1)[26] = math.nan
    stats = layer_stats([w], [g], tau=torch.tensor([10.0]))
    assert stats.nonfinite_weight.tolist() == [0, 3, 0]
    assert stats.nonfinite_grad.tolist() == [0, 0, 1]
    assert stats.below_tau.tolist() == [27, 24, 27]
    assert stats.weight_abs.isfinite().tolist() == [True, False, True]
    assert stats.grad_sq.isfinite().tolist() == [True, True, False]
    assert stats.weight_grad.isfinite().tolist() == [True, False, False]
    assert stats.layer_counts.tolist() == [[78, 3, 1]]
    assert not stats.layer_sums.isfinite().any()


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_overflow_is_not_counted_as_nonfinite():
    stats = layer_stats([torch.full((1, 8200), 3e38)])
    assert stats.weight_sq.isinf().all()
    assert stats.nonfinite_weight.tolist() == [0]


def test_threshold_is_strict():
    w = torch.tensor([[0.5, -0.5, 0.25, -0.0]])
    stats = layer_stats([w, w, w], tau=torch.tensor([0.5, 0.0, math.nan]))
    assert stats.below_tau.tolist() == [2, 0, 0]


def test_nothing():
    stats = layer_stats([])
    assert stats.filter_sums.shape == (6, 0)
    assert stats.layer_sums.shape == (0, 7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_input_sums(dtype):
    """Channels outermost, innermost and in between; two slabs of filters; none at all."""
    from psap_kernels.triton._input_sums import input_sums

    middle = make(2, 4, 3, 5, dtype=dtype).transpose(1, 2).contiguous().transpose(1, 2)
    weights = [
        make(65, 3, dtype=dtype),
        make(2, 20, 2, 2, dtype=dtype),
        make(2, 4, 3, 3, dtype=dtype).to(memory_format=torch.channels_last),
        middle,
        make(3, 1, 3, dtype=dtype),
        make(5, dtype=dtype),
        make(0, 3, dtype=dtype),
        make(1, 2, 0, dtype=dtype),
    ]
    grads = [w.flip(0).clone() for w in weights]
    got = input_sums(weights, grads, torch.zeros(8))
    wg = [(w.double() * g.double()).abs() for w, g in zip(weights, grads, strict=True)]
    magnitudes = torch.cat([t.transpose(0, 1).flatten(1).sum(1) for t in wg if t.dim() > 1])
    want = reference.layer_stats(weights, grads, torch.zeros(8), True)[4]
    allowed = tolerances.relative(dtype, 6, float32_result=True)
    assert got.shape == want.shape == (3 + 20 + 4 + 4 + 1 + 3 + 2,)
    assert bool(((got - want).abs() <= allowed * magnitudes).all())


def test_input_sums_without_gradients_are_zero():
    from psap_kernels.triton.layer_stats import layer_stats as op

    assert op([make(2, 3), make(4)], [], torch.zeros(2), True)[4].tolist() == [0, 0, 0]


def test_a_repeated_call_uploads_nothing_and_gives_the_same_bits():
    from psap_kernels.triton import _tables

    weights = [make(2, 9, dtype=dtype) for dtype in DTYPES] * 2
    grads = [w.flip(0) for w in weights]
    first = layer_stats(weights, grads, per_input=True)
    caches = (_tables.upload, _tables.program_map)
    before = [cache.cache_info().misses for cache in caches]
    again = layer_stats(weights, grads, per_input=True)
    assert [cache.cache_info().misses for cache in caches] == before
    for name in ("filter_sums", "filter_counts", "layer_sums", "layer_counts"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert torch.equal(first.input_weight_grad, again.input_weight_grad)


def test_the_longest_filters_are_split_into_a_bounded_number_of_pieces():
    from psap_kernels.triton import layer_stats as module

    for length in (0, 1, 8192, 8193, 10**6, 2**31 - 1):
        pieces, size = module.pieces_of(length)
        assert 1 <= pieces <= module.MOST_PIECES
        assert (pieces - 1) * size < max(1, length) <= pieces * size
        assert size % module.FLUSH == 0


def test_rows_more_than_2_to_31_elements_apart(tmp_path):
    far = 2**31 + 8
    memory = torch.from_file(
        str(tmp_path / "sparse"), shared=True, size=far + 16, dtype=torch.float16
    )
    w = memory.as_strided((2, 3), (far, 1))
    w.copy_(make(2, 3, dtype=torch.float16))
    tau = torch.tensor([0.5])
    check([w], [w], tau, layer_stats([w], [w], tau=tau))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (([make(2, 3)], [make(3, 2)], torch.ones(1)), "another shape or dtype"),
        (([make(2, 3)], [make(2, 3).half()], torch.ones(1)), "another shape or dtype"),
        (([make(2, 3)], [make(2, 3)] * 2, torch.ones(1)), "as many grads as weights"),
        (([make(2, 3)], [], torch.ones(2)), r"tau must be \[L\]"),
        (([make(2, 3)], [], torch.ones(1).double()), "tau must be float32"),
        (([make(2, 3).int()], [], torch.ones(1)), "weights must be of a float dtype"),
        (([torch.tensor(1.0)], [], torch.ones(1)), r"weights must be \[O"),
        (([make(2, 3).to("meta")], [], torch.ones(1)), "tensors are on cpu, meta, wanted one"),
    ],
)
def test_the_kernel_checks_too(arguments, match):
    from psap_kernels.triton.layer_stats import layer_stats as op

    with pytest.raises(RuntimeError, match=match):
        op(*arguments)
