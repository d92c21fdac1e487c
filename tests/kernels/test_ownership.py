"""Who owns the tensors while a compiled op runs, and after one that was refused."""

from __future__ import annotations

import pytest
import torch

import psap_kernels

SHAPE = (3, 4)
ROW = torch.tensor([1])


def negated() -> torch.Tensor:
    """A lazy negation: the dispatcher makes what it stands for, for one call alone."""
    x = torch.arange(12.0).reshape(SHAPE) + 1
    lazy = torch.complex(x, 2 * x).conj().imag
    assert lazy.is_neg()
    return lazy


def test_arguments_that_nobody_else_owns(backend):
    """Without an owner, their memory would be free, and used again, before it is read."""
    lazy = [negated() for _ in range(4)]
    plain = [x.resolve_neg().clone() for x in lazy]
    want = psap_kernels.layer_stats(plain, plain, per_input=True)
    got = psap_kernels.layer_stats(lazy, lazy, per_input=True)
    assert torch.equal(got.filter_sums, want.filter_sums)
    assert torch.equal(got.layer_sums, want.layer_sums)
    assert torch.equal(got.input_weight_grad, want.input_weight_grad)
    assert torch.equal(psap_kernels.abs_histogram(lazy), psap_kernels.abs_histogram(plain))
    for small, x in zip(psap_kernels.shrink(lazy, [ROW] * 4), plain, strict=True):
        assert torch.equal(small, x[ROW])
    targets = [torch.zeros(SHAPE) for _ in range(4)]
    psap_kernels.restore_filters_(targets, [ROW] * 4, [x[:1] for x in lazy])
    for target, x in zip(targets, plain, strict=True):
        assert torch.equal(target[1], x[0])


def test_gate_stats_of_arguments_that_nobody_else_owns(backend):
    lazy, ones = negated(), torch.ones(SHAPE)
    sums, seen = torch.zeros(2, 1, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    terms = torch.tensor([[0, 1, 2]], dtype=torch.int32)
    offsets = torch.tensor([0, 1], dtype=torch.int32)
    psap_kernels.gate_stats_(sums, seen, [lazy], [ones], terms, offsets)
    assert sums[0].item() == lazy[1].sum().item() == -52


def test_a_refused_call_keeps_no_tensor(compiled):
    x = [torch.ones(SHAPE) for _ in range(3)]
    wrong = [x[0].double(), x[1], x[2]]
    ops = torch.ops.psap
    calls = {
        r"a gradient differs": lambda: ops.layer_stats(x, wrong, torch.zeros(3)),
        r"tensors must be float32": lambda: ops.abs_histogram([*x, ROW], torch.ones(4), 0, 20, 8),
        r"out of range": lambda: ops.shrink(x, [ROW + 9] * 3, [ROW] * 3),
        r"keep must be a bool": lambda: ops.zero_filters_(x, [ROW] * 3),
        r"saved must be": lambda: ops.restore_filters_(x, [ROW] * 3, wrong),
    }
    before = [t._use_count() for t in x]
    for match, call in calls.items():
        with pytest.raises(RuntimeError, match=match):
            call()
    assert [t._use_count() for t in x] == before
