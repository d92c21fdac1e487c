from __future__ import annotations

import math
import os
import platform
import subprocess
import sys

import pytest
import threads
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psap_kernels import shrink, use_backend

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.int64,
    torch.complex64,
    torch.complex128,
]


def numbers(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.arange(math.prod(shape)).reshape(shape) * 7 % 251).to(dtype)


def check(got: torch.Tensor, x: torch.Tensor, keep0, keep1) -> None:
    """Exactly what indexing gives, in the memory format of ``x``, in memory of its own."""
    want = x if keep0 is None else x[keep0]
    if keep1 is not None and x.dim() > 1:
        want = want[:, keep1]
    assert got.dtype == x.dtype
    assert torch.equal(got, want)
    assert got.untyped_storage().data_ptr() != x.untyped_storage().data_ptr() or x.numel() == 0
    if x.dim() == 4 and x.stride(1) == 1 != x.stride(3) and not x.is_contiguous():
        assert got.is_contiguous(memory_format=torch.channels_last)
    else:
        assert got.is_contiguous()


KEEPS = [
    ([0, 2, 3], [1, 4]),
    ([3, 0, 0], [4, 4, 1, 0]),
    ([], [1]),
    ([1], []),
    ([2], [3]),
    (None, [0, 3]),
    ([1, 2], None),
    (None, None),
    ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4]),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_keep_list(backend, dtype):
    shapes = [(6, 5), (6, 5, 3), (6, 5, 3, 3), (6, 5, 1, 1), (6, 5, 2, 3, 2), (6,)]
    for keep0, keep1 in KEEPS:
        tensors = [numbers(shape, dtype) for shape in shapes]
        lists = [None if k is None else torch.tensor(k, dtype=torch.int64) for k in (keep0, keep1)]
        outputs = shrink(tensors, [lists[0]] * len(shapes), [lists[1]] * len(shapes))
        for got, x in zip(outputs, tensors, strict=True):
            check(got, x, *lists)


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (1, 3), (7, 7), (2, 9)], ids=str)
@pytest.mark.parametrize("channels", [1, 5])
def test_memory_formats(backend, kernel, channels):
    x = numbers((6, channels, *kernel))
    wide = numbers((6, channels, kernel[0], 2 * kernel[1] + 1))[..., 1::2][..., : kernel[1]]
    tensors = [
        x,
        x.to(memory_format=torch.channels_last),
        wide,
        x.transpose(0, 1).contiguous().transpose(0, 1),
        x.transpose(2, 3),
        numbers((6, channels + 3, *kernel))[:, 1 : channels + 1],
        x.expand(6, channels, *kernel)[:1].expand(6, channels, *kernel),
    ]
    keep0, keep1 = torch.tensor([4, 1, 2]), torch.tensor([0, channels - 1])
    for keeps in ((keep0, keep1), (keep0, None)):
        for got, x in zip(shrink(tensors, [keeps[0]] * 7, [keeps[1]] * 7), tensors, strict=True):
            check(got, x, *keeps)


def test_three_dimensional_channels_last(backend):
    x = numbers((4, 3, 2, 3, 2)).to(memory_format=torch.channels_last_3d)
    keep0, keep1 = torch.tensor([3, 1]), torch.tensor([2, 0])
    (got,) = shrink([x], [keep0], [keep1])
    assert torch.equal(got, x[keep0][:, keep1])
    assert got.is_contiguous(memory_format=torch.channels_last_3d)


def test_keep_lists_may_be_strided(backend):
    x, keep = numbers((6, 5, 3)), torch.tensor([4, 9, 0, 9, 1])[::2]
    check(shrink([x], [keep], [keep])[0], x, keep, keep)


def test_without_keep_dim1(backend):
    x, keep = [numbers((6, 5)), numbers((6,))], torch.tensor([5, 1])
    for got, tensor in zip(shrink(x, [keep, keep]), x, strict=True):
        check(got, tensor, keep, None)


def test_one_dimension_ignores_keep_dim1(backend):
    x, keep, wild = numbers((6,)), torch.tensor([5, 1]), torch.tensor([99])
    check(shrink([x], [keep], [wild])[0], x, keep, None)


def test_nothing(backend):
    assert shrink([], []) == []
    empty = torch.empty(0, 3)
    check(shrink([empty], [None], [torch.tensor([1])])[0], empty, None, torch.tensor([1]))
    flat = torch.empty(3, 0, 2)
    check(shrink([flat], [torch.tensor([1])])[0], flat, torch.tensor([1]), None)


def test_nan_payloads_survive(backend):
    x = torch.tensor([[0x7FC12345, -1]], dtype=torch.int32).view(torch.float32)
    (got,) = shrink([x], [None], [torch.tensor([1, 0])])
    assert got.view(torch.int32).tolist() == [[-1, 0x7FC12345]]


def test_parameters(backend):
    x = torch.nn.Parameter(numbers((6, 5)))
    (got,) = shrink([x], [torch.tensor([1])])
    assert not got.requires_grad


def test_many_rows_on_several_threads(compiled):
    x = [numbers((900, 130, 3, 3)), numbers((900,)), numbers((900, 130, 1, 1))]
    keep0, keep1 = torch.arange(0, 900, 2), torch.arange(0, 130, 3)
    for n in (1, 2, 5):
        with threads.using(n):
            for got, tensor in zip(shrink(x, [keep0] * 3, [keep1] * 3), x, strict=True):
                check(got, tensor, keep0, keep1)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    order=st.randoms(use_true_random=False),
    dtype=st.sampled_from(DTYPES),
)
def test_compiled_and_reference_agree_on_values_and_strides(shape, order, dtype):
    dims = list(range(len(shape)))
    order.shuffle(dims)
    back = [dims.index(d) for d in range(len(shape))]
    x = numbers(tuple(shape), dtype).permute(dims).contiguous().permute(back)
    keeps = [
        torch.tensor([order.randrange(n) for _ in range(order.randrange(7))], dtype=torch.int64)
        for n in (*shape, 1)[:2]
    ]
    (got,) = shrink([x], keeps[:1], keeps[1:])
    with use_backend("reference"):
        (want,) = shrink([x], keeps[:1], keeps[1:])
    assert torch.equal(got, want)
    assert got.stride() == want.stride()


X, KEEP = torch.ones(4, 3), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((X, [KEEP]), TypeError, r"tensors is a Tensor, wanted a list .* \[tensors\]"),
        (([X], KEEP), TypeError, r"keep_dim0 is a Tensor, wanted a list .* \[keep_dim0\]"),
        (([X], [[0, 1]]), TypeError, r"keep_dim0\[0\] is a list, wanted a tensor"),
        (([X], []), ValueError, r"keep_dim0 has 0 entries, wanted 1"),
        (([X], [None], [None] * 2), ValueError, r"keep_dim1 has 2 entries, wanted 1"),
        (([torch.tensor(1.0)], [None]), ValueError, r"tensors\[0\] has no dimension"),
        (([X], [KEEP.int()]), TypeError, r"keep_dim0\[0\] is torch.int32, wanted torch.int64"),
        (([X], [KEEP > 0]), TypeError, r"keep_dim0\[0\] is torch.bool, wanted torch.int64"),
        (([X], [KEEP[None]]), ValueError, r"keep_dim0\[0\] has shape \[1, 2\], wanted one dim"),
        (([X], [KEEP + 3]), ValueError, r"keep_dim0\[0\] has index 4, wanted 0 <= index < 4"),
        (([X], [None], [KEEP - 1]), ValueError, r"keep_dim1\[0\] has index -1, wanted 0 <= index"),
        (([X, X.to("meta")], [None] * 2), ValueError, r"tensors\[1\] is on meta, wanted cpu"),
        (([X], [KEEP.to("meta")]), ValueError, r"keep_dim0\[0\] is on meta, wanted cpu"),
    ],
)
def test_wrong_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        shrink(*arguments)


def test_the_kernel_checks_too(compiled):
    op = torch.ops.psap.shrink
    with pytest.raises(RuntimeError, match=r"an index in keep_dim0 of tensor 0 is out of range"):
        op([X], [KEEP + 3], [KEEP])
    with pytest.raises(RuntimeError, match=r"an index in keep_dim1 of tensor 0 is out of range"):
        op([X], [KEEP], [KEEP - 1])
    with pytest.raises(RuntimeError, match=r"one keep_dim0 and one keep_dim1 for each tensor"):
        op([X], [KEEP], [])
    with pytest.raises(
        RuntimeError, match=r"keep_dim1 must hold int64 CPU tensors of one dimension"
    ):
        op([X], [KEEP], [KEEP[None]])
    with pytest.raises(RuntimeError, match=r"keep_dim0 must hold int64 CPU tensors"):
        op([X], [KEEP.int()], [KEEP])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="MALLOC_PERTURB_ is glibc's")
def test_every_byte_of_the_output_is_written(compiled):
    """The kernel takes its memory past PyTorch, which could poison it: malloc does it here."""
    code = (
        "import torch, psap_kernels\n"
        "for dtype in (torch.uint8, torch.float32):\n"
        "  for shape in ((6, 5), (6,), (40, 33, 3, 3), (7, 9, 5, 5), (6, 20, 2, 2, 2)):\n"
        "    x = torch.ones(shape, dtype=dtype)\n"
        "    for y in (x, x.movedim(0, -1).contiguous().movedim(-1, 0)):\n"
        "      for n in (1, 2, 5):\n"
        "        for keep in (torch.arange(n), None):\n"
        "          (out,) = psap_kernels.shrink([y], [torch.arange(n)], [keep])\n"
        "          assert bool((out == 1).all()), (dtype, shape, n)\n"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "MALLOC_PERTURB_": "165"}
    )


@pytest.mark.parametrize("keep", ["none", "random", "reversed", "runs"])
def test_long_rows_and_runs(backend, keep):
    """More kept cells than are fetched ahead, in every order."""
    lists = {
        "none": None,
        "random": torch.randperm(50)[:31],
        "reversed": torch.arange(49, 0, -2),
        "runs": torch.tensor([*range(3, 20), *range(30, 33), 41]),
    }
    for shape in ((50, 50, 3, 3), (50, 50, 2, 2), (50, 50, 1, 1), (50, 50), (50,)):
        x = numbers(shape)
        for y in (x, x.to(memory_format=torch.channels_last)) if len(shape) == 4 else (x,):
            for other in (lists[keep], None):
                (got,) = shrink([y], [lists[keep]], [other])
                check(got, y, lists[keep], other)
