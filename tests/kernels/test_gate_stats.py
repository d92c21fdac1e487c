from __future__ import annotations

import math
from itertools import pairwise

import pytest
import threads
import torch

from psap_kernels import gate_stats_

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def ints(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def state(channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(2, channels, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)


def case(dtype: torch.dtype) -> tuple[list, list, torch.Tensor, torch.Tensor]:
    """An affine pair, filters in channels_last, a bias, and saved copies of two of the rows."""
    values = [
        torch.randn(6).to(dtype),
        torch.randn(6, 5, 3, 3).to(dtype).contiguous(memory_format=torch.channels_last),
        torch.randn(3, 6, 2).to(dtype).movedim(1, 0),
        torch.randn(2, 5, 3, 3).to(dtype),
    ]
    grads = [torch.randn_like(v) for v in values[:3]]
    grads.append(grads[1])
    terms = ints(
        (0, 0, 0), (1, 0, 0), (2, 5, 5), (0, 1, 1), (3, 1, 2), (3, 0, 4), (2, 0, 0), (0, 5, 5)
    )
    return values, grads, terms, torch.tensor([0, 3, 5, 5, 8], dtype=torch.int32)


def expected(values, grads, terms, offsets, scale) -> torch.Tensor:
    dots = torch.stack(
        [(values[k][i].double() * grads[k][j].double()).sum() for k, i, j in terms.tolist()]
    )
    return scale * torch.stack([dots[a:b].sum() for a, b in pairwise(offsets)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_running_sums(backend, dtype):
    values, grads, terms, offsets = case(dtype)
    sums, seen = state(4)
    d = expected(values, grads, terms, offsets, 0.5)
    gate_stats_(sums, seen, values, grads, terms, offsets, scale=0.5)
    torch.testing.assert_close(sums, torch.stack([d, d * d]), rtol=1e-13, atol=1e-13)
    gate_stats_(sums, seen, values, grads, terms, offsets, scale=-1.0)
    want = torch.stack([d - 2 * d, d * d + 4 * d * d])
    torch.testing.assert_close(sums, want, rtol=1e-12, atol=1e-12)
    assert seen.tolist() == [2, 0]
    assert sums[:, 2].tolist() == [0, 0]  # a channel without terms


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_observation_that_is_not_finite_is_left_out(backend, bad):
    values, grads, terms, offsets = case(torch.float32)
    sums, seen = state(4)
    gate_stats_(sums, seen, values, grads, terms, offsets)
    before = sums.clone()
    grads[2][0, 0, 0] = bad
    gate_stats_(sums, seen, values, grads, terms, offsets)
    assert torch.equal(sums, before)
    assert seen.tolist() == [1, 1]
    grads[2][0, 0, 0] = 0
    gate_stats_(sums, seen, values, grads, terms, offsets)
    assert seen.tolist() == [2, 1]


def test_rows_that_no_term_names_are_not_read(backend):
    values, grads, terms, offsets = case(torch.float32)
    grads[0][3] = math.nan
    sums, seen = state(4)
    gate_stats_(sums, seen, values, grads, terms, offsets)
    assert seen.tolist() == [1, 0]
    assert sums.isfinite().all()


def test_bits_do_not_depend_on_threads(backend):
    count = 9000
    values, grads = [torch.randn(count, 3)], [torch.randn(count, 3)]
    rows = torch.arange(count, dtype=torch.int32)
    terms = torch.stack([torch.zeros_like(rows), rows, rows], 1)
    offsets = torch.arange(count + 1, dtype=torch.int32)
    results = []
    for n in (1, 4):
        sums, seen = state(count)
        with threads.using(n):
            gate_stats_(sums, seen, values, grads, terms, offsets)
        results.append(sums)
    assert torch.equal(*results)


def test_nothing_to_do(backend):
    sums, seen = state(0)
    gate_stats_(sums, seen, [], [], ints().reshape(0, 3), torch.zeros(1, dtype=torch.int32))
    assert seen.tolist() == [1, 0]


def test_autograd_is_told(backend):
    values, grads, terms, offsets = case(torch.float32)
    sums, seen = state(4)
    version = sums._version, seen._version
    gate_stats_(sums, seen, [torch.nn.Parameter(v) for v in values], grads, terms, offsets)
    if backend != "reference":
        assert (sums._version, seen._version) == (version[0] + 1, version[1] + 1)
    assert not sums.requires_grad


def wrong(**changes):
    values, grads, terms, offsets = case(torch.float32)
    sums, seen = state(4)
    arguments = {
        "sums": sums,
        "seen": seen,
        "values": values,
        "grads": grads,
        "terms": terms,
        "offsets": offsets,
    }
    return {**arguments, **changes}


@pytest.mark.parametrize(
    "changes, error, match",
    [
        ({"sums": torch.zeros(2, 4)}, TypeError, r"sums is torch.float32, wanted torch.float64"),
        ({"sums": 1.0}, TypeError, r"sums is a float, wanted a tensor"),
        ({"sums": torch.zeros(2, 3).double()}, ValueError, r"sums has shape \[2, 3\]"),
        ({"sums": torch.zeros(4, 2).double().T}, ValueError, r"sums is not contiguous"),
        ({"seen": torch.zeros(3, dtype=torch.int64)}, ValueError, r"seen has shape \[3\]"),
        ({"values": []}, ValueError, r"grads has 4 entries, wanted 0"),
        ({"terms": ints((0, 0))}, ValueError, r"terms has shape \[1, 2\], wanted \[1, 3\]"),
        ({"terms": ints(*[(4, 0, 0)] * 8)}, ValueError, r"terms\[0\] is \[4, 0, 0\], wanted"),
        ({"terms": ints(*[(0, 6, 0)] * 8)}, ValueError, r"terms\[0\] is \[0, 6, 0\]"),
        ({"terms": ints(*[(0, 0, -1)] * 8)}, ValueError, r"terms\[0\] is \[0, 0, -1\]"),
        ({"offsets": ints(0, 3, 5, 5, 9)}, ValueError, r"offsets run from 0 to 9, wanted"),
        ({"offsets": ints(0, 5, 3, 5, 8)}, ValueError, r"wanted an ascending list from 0 to 8"),
    ],
)
def test_wrong_arguments(backend, changes, error, match):
    arguments = wrong(**changes)
    with pytest.raises(error, match=match):
        gate_stats_(**arguments)


def test_wrong_pairs(backend):
    values, grads, _, _ = case(torch.float32)
    with pytest.raises(TypeError, match=r"grads\[1\] is torch.float64, wanted torch.float32"):
        gate_stats_(**wrong(grads=[grads[0], grads[1].double(), *grads[2:]]))
    with pytest.raises(ValueError, match=r"grads\[0\] has shape \[6, 1\], wanted"):
        gate_stats_(**wrong(grads=[grads[0][:, None], *grads[1:]]))
    with pytest.raises(ValueError, match=r"values\[0\] has no dimension"):
        gate_stats_(**wrong(values=[torch.tensor(1.0), *values[1:]]))
    with pytest.raises(ValueError, match=r"values\[0\] is on meta"):
        gate_stats_(**wrong(values=[values[0].to("meta"), *values[1:]]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_avx2_gives_the_bits_of_the_portable_kernel(compiled, monkeypatch, dtype):
    generator = torch.Generator().manual_seed(3)
    values = [torch.randn(2, n, generator=generator).to(dtype) for n in range(1, 70)]
    grads = [torch.randn(2, n, generator=generator).to(dtype) for n in range(1, 70)]
    terms = torch.tensor([(k, 1, 0) for k in range(69)], dtype=torch.int32)
    results = []
    for capability in ("", "default"):
        monkeypatch.setenv("PSAP_CPU_CAPABILITY", capability)
        sums, seen = state(69)
        gate_stats_(sums, seen, values, grads, terms, torch.arange(70, dtype=torch.int32))
        results.append(sums)
    assert torch.equal(*results)
    offsets = torch.arange(70)
    torch.testing.assert_close(
        results[0][0], expected(values, grads, terms, offsets, 1.0), rtol=1e-12, atol=1e-13
    )
