"""zero_filters_, restore_filters_, shrink in Triton's interpreter: bits, whatever the strides."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from psap_kernels import reference, restore_filters_, shrink, use_backend, zero_filters_

pytest.importorskip("triton", reason="triton is a test dependency on Linux")

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
]
KEEP = torch.tensor([True, False, True, False])
ROWS = torch.tensor([3, 9, 1, 9])[::2]


@pytest.fixture(autouse=True)
def forced() -> Iterator[None]:
    with use_backend("triton"):
        yield


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.arange(math.prod(shape)).reshape(shape) * 7 % 251 + 1).to(dtype)


def layouts(dtype: torch.dtype) -> list[torch.Tensor]:
    """Four filters each: vectors, words of every width, up to four dimensions, five and more."""
    x = numbers(4, 6, 3, 3, dtype=dtype)
    return [
        numbers(4, 16, 4, dtype=dtype),
        numbers(4, 15, dtype=dtype),
        numbers(4, 700, dtype=dtype),
        x.clone(),
        x.to(memory_format=torch.channels_last),
        x.transpose(0, 1).contiguous().transpose(0, 1),
        x.repeat(1, 1, 1, 2)[..., ::2],
        numbers(4, 18, dtype=dtype)[:, 1:],
        numbers(4, dtype=dtype),
        numbers(8, dtype=dtype)[::2],
        x[:, :0].clone(),
        numbers(4, 2, 4, 2, 4, 6, dtype=dtype)[:, :, ::2, :, ::2, ::2],
        numbers(4, 2, 4, 2, 4, 2, 4, 2, dtype=dtype)[:, :, ::2, :, ::2, :, ::2],
        numbers(4, 4, 2, 4, 2, 4, 2, 4, 2, 4, dtype=dtype)[:, ::2, :, ::2, :, ::2, :, ::2, :, ::2],
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero(dtype):
    tensors = layouts(dtype)
    before = [t.clone() for t in tensors]
    assert zero_filters_(tensors, [KEEP] * len(tensors)) is None
    for got, was in zip(tensors, before, strict=True):
        assert torch.equal(got[KEEP], was[KEEP])
        assert torch.equal(got[~KEEP], torch.zeros_like(was[~KEEP]))


def test_zero_clears_nan_stays_inside_views_and_takes_strided_masks():
    x = torch.tensor([[math.nan, math.inf, -1.0], [math.nan, -math.inf, -0.0]])
    base = torch.ones(6, 10)
    zero_filters_([x, base[1:5, 2:7]], [torch.tensor([False, True, True, True])[::2][:2], KEEP])
    assert torch.equal(x[0], torch.zeros(3))
    assert not x[0].signbit().any()
    assert x[1].signbit()[1:].tolist() == [True, True]
    want = torch.ones(6, 10)
    want[[2, 4], 2:7] = 0
    assert torch.equal(base, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_restore(dtype):
    tensors = layouts(dtype)
    originals = [t.clone() for t in tensors]
    saved = [t[ROWS] for t in tensors]
    saved[4] = saved[4].contiguous()
    saved[0] = torch.stack([saved[0]] * 2, -1)[..., 0]
    for t in tensors:
        t.zero_()
    assert restore_filters_(tensors, [ROWS] * len(tensors), saved) is None
    for got, want in zip(tensors, originals, strict=True):
        assert torch.equal(got[ROWS], want[ROWS])
        assert not got[[0, 2]].any()


def test_every_bit_is_kept():
    bits = torch.tensor([[0x7FC12345, -(2**31), 1, 0x7F800001]], dtype=torch.int32)
    x = torch.zeros(2, 4)
    restore_filters_([x], [torch.tensor([1])], [bits.view(torch.float32)])
    assert torch.equal(x[1:].view(torch.int32), bits)
    (got,) = shrink([x], [torch.tensor([1])], [torch.tensor([3, 1, 0])])
    assert got.view(torch.int32).tolist() == [[0x7F800001, -(2**31), 0x7FC12345]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shrink(dtype):
    tensors = [t for t in layouts(dtype) if t.dim() == 1 or t.shape[1] > 1]
    volume = numbers(4, 6, 2, 3, 2, dtype=dtype)
    tensors += [volume.to(memory_format=torch.channels_last_3d), volume.transpose(2, 4)]
    for keep0, keep1 in (([3, 0, 0], [1, 0]), ([1], [1]), ([], [0]), ([2, 3], [])):
        rows, columns = torch.tensor(keep0, dtype=torch.int64), torch.tensor(keep1).long()
        keeps = [rows] * len(tensors), [columns] * len(tensors)
        wanted = reference.shrink(tensors, *keeps)
        for x, got, want in zip(tensors, shrink(tensors, *keeps), wanted, strict=True):
            assert got.dtype == want.dtype
            assert torch.equal(got, want)
            assert got.is_contiguous(memory_format=reference.memory_format(x))


def test_shrink_of_everything_and_of_nothing():
    x = [numbers(4, 6, 3, 3), numbers(3), numbers(1, 1), numbers(700, 3)]
    for got, want in zip(shrink(x, [None] * 4), x, strict=True):
        assert torch.equal(got, want)
    assert shrink([], []) == []
    (got,) = shrink([numbers(6)], [torch.tensor([5, 1])], [torch.tensor([99])])
    assert got.tolist() == numbers(6)[[5, 1]].tolist()


def test_conjugate_views_are_numbers_not_bits():
    x = torch.tensor([[1 + 2j, 3 - 1j], [2j, 1]])
    (got,) = shrink([x.conj()], [torch.tensor([1, 0])])
    assert torch.equal(got, x.conj()[[1, 0]])
    target = torch.zeros_like(x)
    restore_filters_([target], [torch.tensor([0])], [x.conj()[:1]])
    assert torch.equal(target[0], x.conj()[0])


def test_many_tensors_in_one_launch():
    tensors = [torch.ones(2) for _ in range(40)]
    zero_filters_(tensors, [torch.tensor([False, True])] * len(tensors))
    assert torch.stack(tensors).sum(0).tolist() == [0, 40]


def test_a_repeated_call_uploads_nothing():
    from psap_kernels.triton import _tables

    tensors, saved = [numbers(4, 5), numbers(4)], [numbers(2, 5), numbers(2)]
    for _ in range(2):
        zero_filters_(tensors, [KEEP] * 2)
        restore_filters_(tensors, [ROWS] * 2, saved)
        counts = [c.cache_info().misses for c in (_tables.upload, _tables.program_map)]
    zero_filters_(tensors, [KEEP] * 2)
    restore_filters_(tensors, [ROWS] * 2, saved)
    assert counts == [c.cache_info().misses for c in (_tables.upload, _tables.program_map)]


def test_rows_more_than_2_to_31_elements_apart(tmp_path):
    far = 2**31 + 8
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=far + 16, dtype=torch.int8)
    x = memory.as_strided((2, 3), (far, 1))
    restore_filters_([x], [torch.tensor([1])], [torch.tensor([[1, 2, 3]], dtype=torch.int8)])
    assert x.tolist() == [[0, 0, 0], [1, 2, 3]]
    (got,) = shrink([x], [torch.tensor([1])], [torch.tensor([2, 0])])
    assert got.tolist() == [[3, 1]]
    zero_filters_([x], [torch.tensor([True, False])])
    assert not x.any()


def test_indices_out_of_range_are_masked():
    """The public functions refuse them; through the dispatcher they must do no harm."""
    from psap_kernels.triton.restore_filters_ import restore_filters_ as restore
    from psap_kernels.triton.shrink import shrink as gather

    base = torch.ones(4, 3)
    restore([base[:2]], [torch.tensor([3, -1])], [torch.zeros(2, 3)])
    assert base.eq(1).all()
    (got,) = gather([base], [torch.tensor([4, 1])], [torch.tensor([0, -1])])
    assert got.tolist() == [[0, 0], [1, 0]]


X = numbers(4, 3)


@pytest.mark.parametrize(
    ("op", "arguments", "match"),
    [
        ("zero_filters_", ([X], []), "one keep for each tensor"),
        ("zero_filters_", ([X], [KEEP[:2]]), "keep must be bool, one value"),
        ("zero_filters_", ([X], [ROWS]), "keep must be bool, one value"),
        ("zero_filters_", ([X[0].expand(4, 3)], [KEEP]), "an expanded tensor"),
        ("zero_filters_", ([X], [KEEP.to("meta")]), "tensors are on cpu, meta"),
        ("restore_filters_", ([X], [ROWS], []), "one list of rows and one saved"),
        ("restore_filters_", ([X], [ROWS.int()], [X[:2]]), "rows must be int64"),
        ("restore_filters_", ([X], [ROWS], [X]), "saved must have the dtype"),
        ("restore_filters_", ([X[:1].expand(4, 3)], [ROWS], [X[:2]]), "an expanded tensor"),
        ("restore_filters_", ([X], [ROWS.to("meta")], [X[:2]]), "tensors are on cpu, meta"),
        ("shrink", ([X], [ROWS], []), "one keep_dim0 and one keep_dim1"),
        ("shrink", ([X], [ROWS.int()], [ROWS]), "keep lists must be int64"),
        ("shrink", ([X], [ROWS], [ROWS[None]]), "keep lists must be int64, of one dim"),
        ("shrink", ([X], [ROWS], [ROWS.to("meta")]), "tensors are on cpu, meta"),
    ],
)
def test_the_kernels_check_too(op, arguments, match):
    from psap_kernels import _load

    with pytest.raises(RuntimeError, match=match):
        _load.triton_op(op)(*arguments)
