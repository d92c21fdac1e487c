"""The CUDA kernel of shrink, on the emulator: gaps, alignment, short and very long rows."""

from __future__ import annotations

import emulation
import pytest
import torch
from emulation import Emulated
from test_emulated_kernels import KINDS, fill

from psap_kernels import reference


def check(plain: Emulated, tensors: list, keep0: torch.Tensor, keep1: torch.Tensor) -> None:
    first, second = [keep0] * len(tensors), [keep1] * len(tensors)
    got = plain.shrink(tensors, first, second)
    want = reference.shrink(tensors, first, second)
    for i, (x, y) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(x, y), i
        assert x.stride() == y.stride(), i


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_kernels_with_gaps(plain, dtype):
    last = fill((6, 9, 4, 3), dtype).contiguous(memory_format=torch.channels_last)
    tensors = [
        fill((6, 5, 3, 6), dtype)[:, :, :, ::2],
        fill((6, 5, 5, 4), dtype)[:, :, 1:4, 1:],
        last[:, 2:7],
        fill((3, 4, 6, 5), dtype).permute(2, 3, 0, 1),
        fill((6, 5, 2), dtype).expand(2, 6, 5, 2).permute(1, 2, 3, 0),
        fill((5, 6), dtype).t(),
        fill((12,), dtype)[::2],
    ]
    check(plain, tensors, torch.tensor([5, 0, 0, 3]), torch.tensor([4, 1, 2]))


@pytest.mark.parametrize("skew", range(16))
def test_wherever_tensors_begin(plain, skew):
    for dtype in (torch.uint8, torch.float16, torch.float32):
        tensors = [
            fill((6 * 5 * 4 + skew,), dtype)[skew:].view(6, 5, 4),
            fill((6 * 5 + skew,), dtype)[skew:].view(6, 5),
            fill((6 * 7 + skew,), dtype)[skew:].view(6, 7)[:, 1:6],
        ]
        check(plain, tensors, torch.tensor([1, 5, 0]), torch.tensor([3, 0, 4]))


def test_elements_of_16_bytes_at_a_multiple_of_8(plain):
    x = fill((30 * 16 + 8,), torch.uint8)
    x = torch.frombuffer(x.numpy(), dtype=torch.complex128, offset=8).view(6, 5)
    assert x.data_ptr() % 16 == 8
    check(plain, [x, x.view(6, 5, 1), x.view(3, 2, 5)[:, :, ::2]], *torch.tensor([[1, 2], [1, 0]]))


@pytest.mark.parametrize("schedule", range(5))
def test_short_rows_share_blocks(plain, schedule):
    plain.module.set_schedule(schedule)
    keep = torch.randperm(5000)[:4111]
    try:
        for dtype in (torch.uint8, torch.float32, torch.complex128):
            tensors = [
                fill((5000,), dtype),
                fill((5000, 1, 3, 3), dtype),
                fill((5000, 2), dtype)[:, 1:],
                fill((5000, 1, 3), dtype)[:, :, ::2],
            ]
            check(plain, tensors, keep, torch.tensor([0]))
    finally:
        plain.module.set_schedule(0)


@pytest.mark.parametrize("width", [1, 2, 511, 512, 513, 1023, 1024, 1025, 2048, 2049, 5000])
def test_widths_around_what_a_block_writes(plain, width):
    x = fill((7, width), torch.float64)
    last = fill((5, width, 1, 3), torch.float32).contiguous(memory_format=torch.channels_last)
    keep = torch.arange(width).flip(0)
    check(plain, [x, last], torch.tensor([4, 0, 2]), keep)


@pytest.mark.parametrize("limit", [9, 10, 17, 18, 63, 100])
def test_rows_of_too_many_words_become_several_jobs(plain, limit):
    x, keep0, keep1 = (
        fill((4, 20, 3, 3), torch.float32),
        torch.tensor([3, 1]),
        torch.arange(19, 2, -2),
    )
    out = torch.zeros(2, 9, 3, 3)
    lists = [emulation.raw([k]) for k in (keep0, keep1)]
    plain.module.shrink(emulation.raw([x]), *lists, emulation.raw([out]), limit)
    assert torch.equal(out, x[keep0][:, keep1])


def test_what_is_too_long_for_32_bits_is_refused(plain):
    x, keep = fill((4, 4, 3, 3), torch.float32), torch.tensor([1, 2])
    for tensor in (x, x.contiguous(memory_format=torch.channels_last)):
        out = torch.empty_like(tensor[:2, :2])
        lists = emulation.raw([keep])
        with pytest.raises(RuntimeError, match="a kernel is too long"):
            plain.module.shrink(emulation.raw([tensor]), lists, lists, emulation.raw([out]), 8)


def test_bad_indices_trap_before_they_are_followed(plain):
    x = fill((300, 3), torch.float32)
    last = fill((3, 4, 2, 2), torch.float32).contiguous(memory_format=torch.channels_last)
    gaps = fill((3, 4, 6), torch.float32)[:, :, ::2]
    good, far = torch.tensor([0, 1]), 2**40
    for tensor in (x, x[:, 0], last, gaps):
        for bad in (torch.tensor([0, tensor.shape[0]]), torch.tensor([-1, 0]), good + far):
            with pytest.raises(plain.module.EmulatorError, match="__trap"):
                plain.shrink([tensor], [bad], [good])
    for tensor in (x, last, gaps):
        for bad in (torch.tensor([0, tensor.shape[1]]), torch.tensor([-far, 0])):
            with pytest.raises(plain.module.EmulatorError, match="__trap"):
                plain.shrink([tensor], [good], [bad])
