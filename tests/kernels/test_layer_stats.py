from __future__ import annotations

import math
import struct

import numpy as np
import oracle
import pytest
import threads
import tolerances
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import psap_kernels
from psap_kernels import layer_stats

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [
    (7,),
    (1, 1),
    (3, 8),
    (5, 33),
    (1, 4097),
    (2, 3, 5),
    (16, 3, 3, 3),
    (9, 7, 1, 1),
    (4, 65, 3, 3),
    (3, 5, 2, 3, 3),
]


def make(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + math.prod(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def check(weights, grads, tau, stats) -> None:
    """Compare with the oracle within the table of tolerances; counts exactly."""
    for i, weight in enumerate(weights):
        want = oracle.layer(weight, grads[i] if grads else None, tau[i].item())
        got = stats.layer(i)
        length = weight[0].numel() if len(weight) else 0
        allowed = tolerances.relative(weight.dtype, length, float32_result=True)
        np.testing.assert_array_less(
            np.abs(got.filter_sums.double().numpy() - want.sums[:6]),
            allowed * want.magnitudes[:6] + 1e-300,
        )
        np.testing.assert_array_equal(got.filter_counts.numpy(), want.counts)
        allowed = tolerances.relative(weight.dtype, weight.numel(), float32_result=False)
        np.testing.assert_array_less(
            np.abs(got.layer_sums[0].numpy() - [oracle.add(row) for row in want.sums]),
            allowed * want.magnitudes.sum(1) + 1e-300,
        )
        np.testing.assert_array_equal(got.layer_counts[0].numpy(), want.counts.sum(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_grads", [True, False], ids=["wg", "w"])
def test_against_oracle(backend, dtype, with_grads):
    weights = [make(shape, dtype) for shape in SHAPES]
    grads = [make(shape, dtype, seed=1) for shape in SHAPES] if with_grads else None
    tau = torch.linspace(0, 1.5, len(SHAPES))
    stats = layer_stats(weights, grads, tau=tau)
    check(weights, grads, tau, stats)
    assert stats.filter_sums.dtype == torch.float32
    assert stats.filter_counts.dtype == torch.int32
    assert stats.layer_sums.dtype == torch.float64
    assert stats.layer_counts.dtype == torch.int64


def test_dtypes_may_differ_between_layers(backend):
    weights = [make((5, 3, 3), dtype) for dtype in DTYPES]
    grads = [make((5, 3, 3), dtype, seed=1) for dtype in DTYPES]
    tau = torch.full((4,), 0.5)
    check(weights, grads, tau, layer_stats(weights, grads, tau=tau))


def strided_copies(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same 4-D values in memory of all sorts."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), math.nan, dtype=x.dtype)
    gaps = wide[..., 1::2]
    gaps.copy_(x)
    shifted = torch.full((x.numel() + 1,), math.nan, dtype=x.dtype)[1:].view(x.shape)
    return {
        "contiguous": x,
        "channels_last": x.to(memory_format=torch.channels_last),
        "gaps": gaps,
        "transposed": x.transpose(0, 1).contiguous().transpose(0, 1),
        "reversed": x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        "unaligned": shifted.copy_(x),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(backend, dtype):
    w, g = make((6, 5, 3, 9), dtype), make((6, 5, 3, 9), dtype, seed=1)
    pairs = [(a, b) for a in strided_copies(w).values() for b in strided_copies(g).values()]
    weights, grads = [p[0] for p in pairs], [p[1] for p in pairs]
    tau = torch.full((len(pairs),), 0.7)
    check(weights, grads, tau, layer_stats(weights, grads, tau=tau))


def test_filters_longer_than_a_block_with_strides(backend):
    w = make((3, 40, 9, 9), torch.float32).to(memory_format=torch.channels_last)
    g = make((3, 40, 9, 9), torch.float32, seed=1)
    tau = torch.tensor([0.3])
    check([w], [g], tau, layer_stats([w], [g], tau=tau))


def test_expanded_weight(backend):
    w, tau = make((4, 1, 3), torch.float32).expand(4, 5, 3), torch.tensor([0.3])
    check([w], [w], tau, layer_stats([w], [w], tau=tau))


def test_tau_may_be_strided(backend):
    w, tau = [make((4, 9), torch.float32)] * 2, torch.tensor([0.3, 9.0, 0.9, 9.0])[::2]
    check(w, None, tau, layer_stats(w, tau=tau))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("position", [0, 8, 26, -1])
def test_nonfinite_values_are_counted(backend, dtype, bad, position):
    w, g = make((3, 3, 9), dtype), make((3, 3, 9), dtype, seed=1)
    w[1].view(-1)[position] = bad
    g[2].view(-1)[position] = bad
    stats = layer_stats([w], [g], tau=torch.tensor([10.0]))
    assert stats.nonfinite_weight.tolist() == [0, 1, 0]
    assert stats.nonfinite_grad.tolist() == [0, 0, 1]
    assert stats.below_tau.tolist() == [27, 26, 27]
    assert stats.weight_abs.isfinite().tolist() == [True, False, True]
    assert stats.grad_sq.isfinite().tolist() == [True, True, False]
    assert stats.weight_grad.isfinite().tolist() == [True, False, False]
    assert stats.layer_counts.tolist() == [[80, 1, 1]]
    assert not stats.layer_sums.isfinite().any()


def test_overflow_is_not_counted_as_nonfinite(backend):
    w = torch.full((2, 9), 3e38)
    stats = layer_stats([w], [w])
    assert stats.weight_sq.isinf().all()
    assert stats.nonfinite_weight.tolist() == [0, 0]
    assert stats.nonfinite_grad.tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_finite_16_bit_value_is_read_exactly(backend, dtype):
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    w = bits.view(dtype)
    w = w[w.isfinite()].reshape(-1, 1)
    stats = layer_stats([w])
    assert torch.equal(stats.weight_abs, w[:, 0].float().abs())


def test_subnormals_are_not_flushed(backend):
    tiny = struct.unpack("f", struct.pack("I", 3))[0]
    stats = layer_stats([torch.full((1, 8), tiny)], tau=torch.tensor([tiny]))
    assert stats.weight_abs.item() == 8 * tiny
    assert stats.below_tau.item() == 0


def test_threshold_is_strict_and_negative_zero_counts(backend):
    w = torch.tensor([[0.5, -0.5, 0.25, -0.0]])
    assert layer_stats([w], tau=torch.tensor([0.5])).below_tau.item() == 2
    assert layer_stats([w], tau=torch.tensor([0.0])).below_tau.item() == 0
    assert layer_stats([w], tau=torch.tensor([math.nan])).below_tau.item() == 0
    assert layer_stats([w], tau=torch.tensor([-1.0])).below_tau.item() == 0


def test_empty_lists_and_tensors(backend):
    stats = layer_stats([])
    assert stats.filter_sums.shape == (6, 0)
    assert stats.filter_counts.shape == (3, 0)
    assert stats.layer_sums.shape == (0, 7)
    assert stats.layer_counts.shape == (0, 3)
    assert stats.layer_std().shape == (0,)

    weights = [torch.empty(0, 3, 3, 3), torch.ones(1, 2), torch.empty(2, 0, 3), torch.empty(0)]
    stats = layer_stats(weights, weights, tau=torch.full((4,), 2.0))
    assert stats.offsets == (0, 0, 1, 3, 3)
    assert stats.weight_abs.tolist() == [2.0, 0.0, 0.0]
    assert stats.below_tau.tolist() == [2, 0, 0]
    assert stats.layer_sums[:, 6].tolist() == [0.0, 2.0, 0.0, 0.0]


def test_named_parts(backend):
    w, g = torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 4.0]])
    stats = layer_stats([w, w], [g, g], tau=torch.tensor([1.5, 0.5]))
    names = ["weight_abs", "weight_sq", "grad_abs", "grad_sq", "weight_grad_abs", "weight_grad"]
    assert [getattr(stats, n)[0].item() for n in names] == [3, 5, 7, 25, 11, -5]
    assert stats.layer_sums[1].tolist() == [3, 5, 7, 25, 11, -5, -1]
    assert stats.layer(-1).below_tau.tolist() == [0]
    assert stats.layer(0).below_tau.tolist() == [1]
    with pytest.raises(IndexError, match=r"index is 2, wanted one of 2 layers"):
        stats.layer(2)


def test_layer_std_is_that_of_torch(backend):
    weights = [make(shape, torch.float32) for shape in SHAPES if math.prod(shape) > 1]
    std = layer_stats(weights).layer_std()
    want = torch.stack([w.double().std() for w in weights])
    torch.testing.assert_close(std, want, rtol=1e-6, atol=0)
    assert layer_stats([torch.ones(1)]).layer_std().isnan().all()
    assert layer_stats([torch.full((8,), 0.1)]).layer_std().item() < 1e-4


def network(dtype: torch.dtype) -> list[torch.Tensor]:
    shapes = [(64, 3, 7, 7), (256, 64, 1, 1), (64, 256, 3, 3), (1, 70000), (1000, 130), (3,)]
    return [make(shape, dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_number_of_threads_and_any_instruction_set(compiled, dtype, monkeypatch):
    weights, grads = network(dtype), [w.flip(0) for w in network(dtype)]
    weights[2] = weights[2].to(memory_format=torch.channels_last)
    tau = torch.full((len(weights),), 0.5)
    results = []
    for capability in ("default", ""):
        monkeypatch.setenv("PSAP_CPU_CAPABILITY", capability)
        for n in (1, 2, 5):
            with threads.using(n):
                results.append(torch.ops.psap.layer_stats(weights, grads, tau))
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            assert torch.equal(got, want)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    order=st.randoms(use_true_random=False),
    dtype=st.sampled_from(DTYPES),
    with_grads=st.booleans(),
)
def test_random_layouts(shape, order, dtype, with_grads):
    """Automatic backend: the compiled one where it is built."""
    copies = []
    for seed in range(2):
        dims = list(range(len(shape)))
        order.shuffle(dims)
        back = [dims.index(d) for d in range(len(shape))]
        copies.append(make(tuple(shape), dtype, seed).permute(dims).contiguous().permute(back))
    grads = copies[1:] if with_grads else None
    tau = torch.tensor([0.5])
    check(copies[:1], grads, tau, layer_stats(copies[:1], grads, tau=tau))


def test_parameters_and_their_gradients_are_not_changed(backend):
    w = torch.nn.Parameter(make((4, 3), torch.float32))
    w.grad = make((4, 3), torch.float32, seed=1)
    before, version = w.detach().clone(), w._version
    stats = layer_stats([w], [w.grad])
    assert torch.equal(w, before)
    assert w._version == version
    assert not stats.filter_sums.requires_grad


W = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"weights": W}, TypeError, r"weights is a Tensor, wanted a list .* \[weights\]"),
        ({"weights": [1.0]}, TypeError, r"weights\[0\] is a float, wanted a tensor"),
        ({"weights": [torch.tensor(1.0)]}, ValueError, r"weights\[0\] has no dimension.*reshape"),
        ({"weights": [W, W.int()]}, TypeError, r"weights\[1\] is torch.int32, wanted torch.float"),
        ({"weights": [W.to_sparse()]}, TypeError, r"weights\[0\] has layout .*to_dense"),
        ({"weights": [W], "grads": [W, W]}, ValueError, r"grads has 2 entries, wanted 1"),
        ({"weights": [W], "grads": [None]}, TypeError, r"grads\[0\] is a NoneType"),
        ({"weights": [W], "grads": [W.double()]}, TypeError, r"grads\[0\] is torch.float64, want"),
        ({"weights": [W], "grads": [W.T]}, ValueError, r"grads\[0\] has shape \[3, 2\], wanted"),
        ({"weights": [W], "tau": 0.5}, TypeError, r"tau is a float, wanted a float32 tensor"),
        ({"weights": [W], "tau": torch.ones(1).double()}, TypeError, r"tau is torch.float64"),
        ({"weights": [W], "tau": torch.ones(2)}, ValueError, r"tau has shape \[2\], wanted \[1\]"),
        ({"weights": [W, W.to("meta")]}, ValueError, r"weights\[1\] is on meta, wanted cpu"),
        ({"weights": [W], "grads": [W.to("meta")]}, ValueError, r"grads\[0\] is on meta"),
        ({"weights": [W], "tau": torch.ones(1, device="meta")}, ValueError, r"tau is on meta"),
    ],
)
def test_wrong_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        layer_stats(**arguments)


def test_filter_too_long_for_int32_counts():
    with pytest.raises(ValueError, match=r"2147483648 elements in a filter, wanted at most"):
        layer_stats([torch.empty(1, 2**31, device="meta")])


def test_the_kernel_checks_too(compiled):
    op, tau = torch.ops.psap.layer_stats, torch.ones(1)
    with pytest.raises(RuntimeError, match=r"a gradient differs from its weight"):
        op([W], [W.T], tau)
    with pytest.raises(RuntimeError, match=r"a gradient differs from its weight"):
        op([W], [W.half()], tau)
    with pytest.raises(RuntimeError, match=r"as many grads as weights"):
        op([W], [W, W], tau)
    with pytest.raises(RuntimeError, match=r"tau must be a float32 CPU tensor \[L\]"):
        op([W], [], torch.ones(2))
    with pytest.raises(RuntimeError, match=r"tau must be a float32 CPU tensor"):
        op([W], [], tau.double())
    with pytest.raises(RuntimeError, match=r"weights must be float32"):
        op([W.int()], [], tau)


def test_unknown_capability(compiled, monkeypatch):
    monkeypatch.setenv("PSAP_CPU_CAPABILITY", "sse9")
    with pytest.raises(RuntimeError, match=r"PSAP_CPU_CAPABILITY is 'sse9', wanted"):
        layer_stats([W])
    with pytest.raises(ValueError, match=r"PSAP_CPU_CAPABILITY is 'sse9', wanted"):
        psap_kernels.build_info()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_per_input_channel(backend, dtype):
    shapes = [(7,), (3, 8), (5, 33), (40, 3, 3, 3), (9, 70, 1, 1), (200, 5, 5, 3), (0, 4, 3)]
    weights = [make(shape, dtype) for shape in shapes]
    grads = [make(shape, dtype, seed=1) for shape in shapes]
    for form in (torch.contiguous_format, torch.channels_last):
        weights = [w.contiguous(memory_format=form) if w.dim() == 4 else w for w in weights]
        stats = layer_stats(weights, grads, per_input=True)
        assert stats.input_weight_grad is not None
        assert stats.input_offsets == (0, 0, 8, 41, 44, 114, 119, 123)
        for i, (weight, grad) in enumerate(zip(weights, grads, strict=True)):
            got = stats.layer(i).input_weight_grad
            if weight.dim() == 1:
                assert got.shape == (0,)
                continue
            terms = (weight.double() * grad.double()).transpose(0, 1).flatten(1).numpy()
            want = np.array([oracle.add(row) for row in terms])
            length = weight.numel() // weight.shape[1]
            allowed = tolerances.relative(dtype, length, float32_result=True)
            error = np.abs(got.double().numpy() - want)
            np.testing.assert_array_less(error, allowed * np.abs(terms).sum(1) + 1e-30)


def test_sums_per_input_channel_only_if_asked(backend):
    stats = layer_stats([W], [W])
    assert stats.input_weight_grad is None
    with pytest.raises(ValueError, match="per_input is True without grads"):
        layer_stats([W], per_input=True)


def test_a_long_filter_is_read_in_pieces(backend):
    w, g = make((2, 3, 50_000), torch.float32), make((2, 3, 50_000), torch.float32, seed=1)
    w[1, 2, 49_999], g[0, 1, 7] = math.nan, math.inf
    tau = torch.tensor([0.5])
    stats = layer_stats([w, w], [g, g], tau=tau.repeat(2))
    assert stats.nonfinite_weight.tolist() == [0, 1, 0, 1]
    assert stats.nonfinite_grad.tolist() == [1, 0, 1, 0]
    w, g = w.nan_to_num(0), g.nan_to_num(0, posinf=0)
    check([w], [g], tau, layer_stats([w], [g], tau=tau))


def test_bits_do_not_depend_on_threads(compiled):
    shapes = [(2, 3, 50_000), (64, 64, 3, 3), (512, 40), (3000, 2)]
    weights, grads = (
        [make(s, torch.float32) for s in shapes],
        [make(s, torch.float32, seed=1) for s in shapes],
    )
    results = []
    for n in (1, 2, 3, 8):
        with threads.using(n):
            for per_input in (True, False):
                stats = layer_stats(weights, grads, per_input=per_input)
                results.append((per_input, stats))
    for per_input, stats in results:
        first = results[0 if per_input else 1][1]
        for name in ("filter_sums", "filter_counts", "layer_sums", "layer_counts"):
            assert torch.equal(getattr(stats, name), getattr(first, name)), name
        if per_input:
            assert torch.equal(stats.input_weight_grad, first.input_weight_grad)


def test_ten_thousand_layers(backend):
    weights = list(torch.arange(20_000.0).reshape(10_000, 2, 1).unbind(0))
    stats = layer_stats(weights, weights)
    assert torch.equal(stats.weight_abs, torch.arange(20_000.0))
    assert stats.layer_sums[:, 6].sum() == sum(range(20_000))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_more_elements_than_int32_counts(compiled):
    # One element in memory, 2^31 + 2^16 of them to read.
    w = torch.ones(1).expand(2**15 + 1, 2**16)
    stats = layer_stats([w], tau=torch.tensor([2.0]))
    assert stats.layer_counts[0, 0] == w.numel() > 2**31
    assert stats.layer_sums[0, 6] == w.numel()
