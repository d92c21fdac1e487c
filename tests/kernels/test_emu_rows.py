"""The CUDA kernel of zero_filters_ and restore_filters_, on the emulator: alignment, teams."""

from __future__ import annotations

import pytest
import torch
from emulation import Emulated
from test_emulated_kernels import KINDS, fill

from psap_kernels import reference


def skewed(shape: tuple[int, int], dtype: torch.dtype, skew: int, gap: int) -> torch.Tensor:
    """Rows that begin `skew` elements after a multiple of 16 bytes, `gap` elements apart."""
    rows, width = shape
    return fill((skew + rows * (width + gap),), dtype)[skew:].view(rows, width + gap)[:, :width]


def check(plain: Emulated, tensors: list, saved: list, rows: torch.Tensor) -> None:
    """Both ops, and that nothing beside the rows is written."""
    whole = [x.untyped_storage() for x in tensors]
    before = [torch.tensor([], dtype=torch.uint8).set_(s).clone() for s in whole]
    keep = torch.ones(tensors[0].shape[0], dtype=torch.bool)
    keep[rows] = False
    for op, reference_op, arguments in (
        (plain.restore_filters_, reference.restore_filters_, ([rows] * len(tensors), saved)),
        (plain.zero_filters_, reference.zero_filters_, ([keep] * len(tensors),)),
    ):
        want = []
        for storage, x in zip(whole, tensors, strict=True):
            copy = torch.tensor([], dtype=torch.uint8).set_(storage).clone().untyped_storage()
            want.append(
                torch.tensor([], dtype=x.dtype).set_(copy, x.storage_offset(), x.shape, x.stride())
            )
        op(tensors, *arguments)
        reference_op(want, *arguments)
        for i, (x, y) in enumerate(zip(tensors, want, strict=True)):
            a, b = (torch.tensor([], dtype=torch.uint8).set_(t.untyped_storage()) for t in (x, y))
            assert torch.equal(a, b), i
    assert all(
        not torch.equal(a, torch.tensor([], dtype=torch.uint8).set_(s))
        for a, s in zip(before, whole, strict=True)
    )


@pytest.mark.parametrize("skew", range(16))
def test_wherever_rows_begin(plain, skew):
    rows = torch.tensor([4, 0, 3])
    tensors, saved = [], []
    for dtype in KINDS:
        for width in (1, 2, 7, 16, 37):
            for gap, other in ((0, 0), (1, skew), (3, skew + 1), (16, 2 * skew)):
                tensors.append(skewed((5, width), dtype, skew, gap))
                saved.append(skewed((3, width), dtype, other, 16 - gap))
    check(plain, tensors, saved, rows)


@pytest.mark.parametrize("schedule", range(5))
def test_rows_of_every_length(plain, schedule):
    plain.module.set_schedule(schedule)
    lengths = [1, 3, 4, 5, 31, 64, 65, 255, 257, 511, 513, 4095, 4096, 4097, 9000]
    try:
        tensors = [fill((130, n), torch.float32) for n in lengths[:-5]]
        tensors += [fill((130, n), torch.uint8)[:, : n - 1] for n in lengths[:-5] if n > 1]
        rows = torch.randperm(130)[:77]
        check(plain, tensors, [fill((77, x.shape[1]), x.dtype) for x in tensors], rows)
        tensors = [fill((3, n), torch.float32) for n in lengths[-5:]]
        rows = torch.tensor([2, 0])
        check(plain, tensors, [fill((2, x.shape[1]), x.dtype) for x in tensors], rows)
    finally:
        plain.module.set_schedule(0)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_rows_with_gaps_and_other_strides(plain, dtype):
    last = torch.channels_last
    tensors = [
        fill((5, 3, 4, 6), dtype)[:, :, ::2, 1:],
        fill((3, 5, 2), dtype).movedim(1, 0),
        fill((5, 3, 4, 4), dtype).contiguous(memory_format=last),
        fill((5, 3, 4, 4), dtype),
        fill((300, 5), dtype).t(),
        fill((10,), dtype)[::2],
    ]
    saved = [
        fill((2, 3, 2, 5), dtype).contiguous(memory_format=last),
        fill((2, 2, 3), dtype).transpose(1, 2),
        fill((2, 3, 4, 4), dtype),
        fill((2, 3, 4, 4), dtype).contiguous(memory_format=last),
        fill((2, 1), dtype).expand(2, 300),
        fill((1,), dtype).expand(2),
    ]
    check(plain, tensors, saved, torch.tensor([4, 1]))
    # 16-byte elements that lie at a multiple of 8 only.
    x = fill((2 * 30 * 16 + 8,), torch.uint8)
    x = torch.frombuffer(x.numpy(), dtype=torch.complex128, offset=8).view(10, 6)
    assert x.data_ptr() % 16 == 8
    for part in (x[:5], x[5:, ::2]):
        check(plain, [part], [fill((2, part.shape[1]), x.dtype)], torch.tensor([4, 1]))


def test_lists_with_strides_and_lists_of_nothing(plain):
    x, y = fill((6, 3), torch.float32), fill((6, 3), torch.float32)
    want = x.clone()
    plain.restore_filters_([x], [torch.tensor([9, 1, 9, 4])[1::2]], [y[:2]])
    want[[1, 4]] = y[:2]
    assert torch.equal(x, want)
    plain.restore_filters_([x], [torch.tensor([], dtype=torch.int64)], [y[:0]])
    plain.zero_filters_([x], [torch.ones(12, dtype=torch.bool)[::2]])
    assert torch.equal(x, want)
    plain.zero_filters_([x[:0]], [torch.zeros(0, dtype=torch.bool)])
    assert torch.equal(x, want)
