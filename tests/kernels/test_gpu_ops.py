"""Every op on every device and backend, against float64; the CPU cases show that the tests work."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import oracle
import pytest
import tolerances
import torch

import psap_kernels
from psap_kernels import _load

GPU = ("reference", "cuda", "triton")
PLACES = [
    ("cpu", "reference"),
    ("cpu", "auto"),
    *(pytest.param(("cuda", name), marks=pytest.mark.gpu, id=f"cuda-{name}") for name in GPU),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(7,), (1, 1), (5, 33), (1, 4097), (16, 8, 3, 3), (9, 7, 1, 1), (4, 65, 3, 3)]


@pytest.fixture(params=PLACES, ids="-".join)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """A device, with one of its backends forced."""
    where, backend = request.param
    if backend == "triton" and _load.triton_missing():
        pytest.skip("triton is not installed")
    with psap_kernels.use_backend(backend):
        yield torch.device(where)


def make(shape, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def layouts(dtype, device, seed=0):
    """The shapes, and one of them in memory of other sorts."""
    found = [make(shape, dtype, device, seed) for shape in SHAPES]
    x = make((6, 5, 3, 9), dtype, device, seed)
    gaps = torch.zeros(6, 5, 3, 19, dtype=dtype, device=device)[..., 1::2]
    shifted = torch.zeros(x.numel() + 1, dtype=dtype, device=device)[1:].view(x.shape)
    return [
        *found,
        x.to(memory_format=torch.channels_last),
        x.transpose(0, 1).contiguous().transpose(0, 1),
        gaps.copy_(x),
        shifted.copy_(x),
    ]


def check_stats(weights, grads, tau, stats) -> None:
    for i, weight in enumerate(weights):
        grad = None if grads is None else grads[i].cpu()
        want, got = oracle.layer(weight.cpu(), grad, tau[i].item()), stats.layer(i)
        allowed = tolerances.relative(weight.dtype, weight[0].numel(), float32_result=True)
        error = np.abs(got.filter_sums.double().cpu().numpy() - want.sums[:6])
        np.testing.assert_array_less(error, allowed * want.magnitudes[:6] + 1e-300)
        np.testing.assert_array_equal(got.filter_counts.cpu().numpy(), want.counts)
        allowed = tolerances.relative(weight.dtype, weight.numel(), float32_result=False)
        total = np.array([oracle.add(row) for row in want.sums])
        error = np.abs(got.layer_sums[0].cpu().numpy() - total)
        np.testing.assert_array_less(error, allowed * want.magnitudes.sum(1) + 1e-300)
        np.testing.assert_array_equal(got.layer_counts[0].cpu().numpy(), want.counts.sum(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_grads", [True, False], ids=["wg", "w"])
def test_statistics(device, dtype, with_grads):
    weights = layouts(dtype, device)
    grads = layouts(dtype, device, seed=1) if with_grads else None
    tau = torch.linspace(0, 1.5, len(weights), device=device)
    stats = psap_kernels.layer_stats(weights, grads, tau=tau)
    assert stats.filter_sums.device.type == device.type
    check_stats(weights, grads, tau, stats)


def test_statistics_of_mixed_dtypes_and_strides(device):
    weights = [x for dtype in DTYPES for x in layouts(dtype, device)]
    grads = [x.flip(0) for x in weights]  # contiguous, whatever the weight is
    tau = torch.full((len(weights),), 0.5, device=device)
    check_stats(weights, grads, tau, psap_kernels.layer_stats(weights, grads, tau=tau))


def test_nonfinite_values_are_found(device):
    w, g = make((3, 3, 9), torch.float32, device), make((3, 3, 9), torch.float32, device, 1)
    w[1, 2, 8], g[2, 0, 0] = torch.nan, torch.inf
    stats = psap_kernels.layer_stats([w], [g], tau=torch.tensor([10.0], device=device))
    assert stats.nonfinite_weight.tolist() == [0, 1, 0]
    assert stats.nonfinite_grad.tolist() == [0, 0, 1]
    assert stats.below_tau.tolist() == [27, 26, 27]
    assert stats.weight_abs.isfinite().tolist() == [True, False, True]
    assert stats.layer_counts.tolist() == [[80, 1, 1]]


def test_ten_thousand_layers(device):
    flat = make((10_000, 2, 4), torch.float32, device)
    weights = list(flat.unbind())
    stats = psap_kernels.layer_stats(weights, weights)
    torch.testing.assert_close(
        stats.weight_sq.double(), flat.double().square().sum(2).flatten(), rtol=1e-6, atol=0
    )
    assert stats.layer_sums.shape == (10_000, 7)
    keep = torch.tensor([True, False], device=device)
    psap_kernels.zero_filters_(weights, [keep] * len(weights))
    assert not flat[:, 1].any() and flat[:, 0].all()


def test_statistics_have_the_same_bits_again(device):
    weights = layouts(torch.float32, device)
    first, again = (psap_kernels.layer_stats(weights, weights) for _ in range(2))
    assert torch.equal(first.filter_sums, again.filter_sums)
    assert torch.equal(first.layer_sums, again.layer_sums)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_histogram(device, dtype):
    tensors = layouts(dtype, device)
    tensors[0][0] = torch.nan
    counts = psap_kernels.abs_histogram(tensors).cpu()
    for row, tensor in zip(counts, tensors, strict=True):
        flat = tensor.cpu().float().abs().reshape(-1)
        keys = torch.where(flat.isnan(), 2**31 - 1, flat.view(torch.int32).long())
        assert torch.equal(row[1:-1], torch.bincount(keys >> 20, minlength=2048))
        assert row.sum() == tensor.numel()


def test_gates(device):
    values, grads = layouts(torch.float32, device), layouts(torch.float32, device, seed=1)
    channels = sum(map(len, values))
    table = [(k, i, i) for k, value in enumerate(values) for i in range(len(value))]
    terms = torch.tensor(table, dtype=torch.int32, device=device)
    offsets = torch.arange(channels + 1, dtype=torch.int32, device=device)
    sums = torch.zeros(2, channels, dtype=torch.float64, device=device)
    seen = torch.zeros(2, dtype=torch.int64, device=device)
    psap_kernels.gate_stats_(sums, seen, values, grads, terms, offsets, scale=0.5)
    products = [
        (v.double() * g.double()).cpu().reshape(len(v), -1)
        for v, g in zip(values, grads, strict=True)
    ]
    want = 0.5 * torch.cat([p.sum(1) for p in products])
    bound = torch.cat([p.abs().sum(1) for p in products])
    length = max(v[0].numel() for v in values)
    allowed = tolerances.relative(torch.float32, length, float32_result=True)
    assert ((sums[0].cpu() - want).abs() <= allowed * bound).all()
    torch.testing.assert_close(sums[1], sums[0] ** 2, rtol=1e-12, atol=0)
    before = sums.clone()
    grads[3][0] = torch.inf
    psap_kernels.gate_stats_(sums, seen, values, grads, terms, offsets)
    assert seen.tolist() == [1, 1]
    assert torch.equal(sums, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows(device, dtype):
    tensors = layouts(dtype, device)
    rows = [torch.arange(0, len(t), 2, device=device) for t in tensors]
    columns = [torch.arange(t.shape[1] - 1, -1, -2, device=device) if t.dim() > 1 else None
               for t in tensors]  # fmt: skip
    small = psap_kernels.shrink(tensors, rows, columns)
    for got, t, a, b in zip(small, tensors, rows, columns, strict=True):
        assert torch.equal(got, t[a] if b is None else t[a][:, b])
    before = [t.clone() for t in tensors]
    keep = [torch.arange(len(t), device=device) % 2 == 1 for t in tensors]
    saved = [t[r] for t, r in zip(tensors, rows, strict=True)]
    psap_kernels.zero_filters_(tensors, keep)
    for t, was, kept in zip(tensors, before, keep, strict=True):
        assert not t[~kept].any()
        assert torch.equal(t[kept], was[kept])
    psap_kernels.restore_filters_(tensors, rows, saved)
    assert all(torch.equal(t, was) for t, was in zip(tensors, before, strict=True))
