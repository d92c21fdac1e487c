"""Small cases of every CUDA kernel, which must notice any of the faults in faults.py."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from emulation import Emulated
from test_gate_stats import state
from test_layer_stats import check, make

from psap_kernels import LayerStats, reference


def layer_stats(gpu: Emulated) -> None:
    """Filters of all kinds, alignments, strides that differ, many blocks in a layer, a NaN."""
    shapes = [(40, 3, 3, 3), (9, 37), (5, 4, 3, 3), (9, 12), (2, 70_001), (3, 300), (3, 2100)]
    weights = [make(s, torch.float32) for s in shapes]
    grads = [make(s, torch.float32, seed=1) for s in shapes]
    weights[2] = weights[2].contiguous(memory_format=torch.channels_last)
    grads[3] = torch.full((9 * 12 + 1,), math.nan)[1:].view(9, 12).copy_(grads[3])
    weights.append(make((3, 40), torch.float32)[:, ::2])
    grads.append(make((3, 20), torch.float32, seed=1))
    tau = torch.linspace(0.2, 1, len(weights))
    out = gpu.layer_stats(weights, grads, tau)
    check(weights, grads, tau, LayerStats(*out[:4], tuple(w.shape for w in weights)))
    for bad in (weights[0], grads[5]):
        bad[1, 1] = math.nan
    counts = gpu.layer_stats(weights, grads, tau)[1].sum(1).tolist()
    assert counts[1:] == [9, 1]


def input_sums(gpu: Emulated) -> None:
    shapes = [(9, 37, 2), (5, 33)]
    w = [make(s, torch.float32) for s in shapes]
    g = [make(s, torch.float32, seed=1) for s in shapes]
    got = gpu.layer_stats(w, g, torch.ones(2), True)[4]
    want = reference.layer_stats(w, g, torch.ones(2), True)[4]
    torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-6)


def abs_histogram(gpu: Emulated) -> None:
    x = make((66_003,), torch.float32)
    x[::3] = 0
    tensors = [x, x[1:302], x[:300].view(30, 10)[:, ::3]]
    scales = torch.tensor([1.0, 0.5, 2.0])
    for first, bins in ((1 << 29, 300), (0, 600), (1, 500)):
        got = gpu.abs_histogram(tensors, scales, first, 20, bins)
        assert torch.equal(got, reference.abs_histogram(tensors, scales, first, 20, bins))


def fill(*shape: int) -> torch.Tensor:
    return torch.randint(2, 120, shape).float()


def traps(call: Callable[[], object]) -> None:
    """The call must trap; what it may touch before it does is memory that is there."""
    try:
        call()
    except Exception as error:
        assert "__trap" in str(error), error
    else:
        raise AssertionError("no trap")


def shrink(gpu: Emulated) -> None:
    keep0, keep1 = torch.tensor([5, 0, 3]), torch.tensor([4, 1, 0])
    x = fill(6, 5, 3, 3)
    tensors = [x, x.contiguous(memory_format=torch.channels_last), fill(6, 5), fill(6, 5, 1, 19)]
    tensors.append(fill(6, 5, 3, 6)[..., ::2])
    long = torch.arange(1026, -1, -1)  # a row of blocks of its own, no multiple of 16 bytes
    tensors.append(fill(6, 1027))
    lists = [keep0] * len(tensors), [keep1] * (len(tensors) - 1) + [long]
    got, want = gpu.shrink(tensors, *lists), reference.shrink(tensors, *lists)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    inner = fill(9, 4)[:3]
    traps(lambda: gpu.shrink([inner], [keep0[1:2]], [torch.tensor([5])]))
    traps(lambda: gpu.shrink([inner], [torch.tensor([3])], [keep1[1:]]))


def rows(gpu: Emulated) -> None:
    x = [fill(5, 3, 3, 3), fill(5, 40), fill(5 * 7 + 1)[1:].view(5, 7), fill(5, 3, 4, 4)[..., ::2]]
    for picked in (torch.tensor([4, 0, 2]), torch.tensor([1])):
        saved = [fill(picked.numel(), *t.shape[1:]) for t in x]
        # Neither begins where the other does, one of them not even at 4 bytes of 16.
        halves = torch.randint(2, 120, (5 * 9,), dtype=torch.int16).view(5, 9)
        more = torch.randint(2, 120, (picked.numel() * 9 + 1,), dtype=torch.int16)
        got = [t.clone() for t in (*x, halves)]
        want = [t.clone() for t in got]
        sources = [*saved, more[1:].view(-1, 9)]
        gpu.restore_filters_(got, [picked] * len(got), sources)
        reference.restore_filters_(want, [picked] * len(want), sources)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    keep = torch.tensor([True, False, True, False, False])
    got, want = [t.clone() for t in x], [t.clone() for t in x]
    gpu.zero_filters_(got, [keep] * len(got))
    reference.zero_filters_(want, [keep] * len(want))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    inner = fill(6, 4)[:3]
    traps(lambda: gpu.restore_filters_([inner], [torch.tensor([3])], [fill(1, 4)]))


def gate_stats(gpu: Emulated) -> None:
    """Rows for one lane and for a warp, channels of several blocks, an observation with a NaN."""
    channels, per = 70, 5
    values, grads = [torch.randn(90), torch.randn(90, 40)], [torch.randn(90), torch.randn(90, 40)]
    terms = torch.randint(0, 90, (channels * per, 3), dtype=torch.int32)
    terms[:, 0] %= 2
    offsets = torch.arange(0, channels * per + 1, per, dtype=torch.int32)
    got, want = state(channels), state(channels)
    for bad in (0.0, math.nan, 0.0):
        broken = [grads[0] + bad, grads[1]]
        gpu.gate_stats_(*got, values, broken, terms, offsets, 1.0)
        reference.gate_stats_(*want, values, broken, terms, offsets, 1.0)
    torch.testing.assert_close(got[0], want[0], rtol=1e-11, atol=1e-11)
    assert got[1].tolist() == [2, 1]
    offsets[-1] -= 1
    traps(lambda: Emulated(gpu.module).gate_stats_(*got, values, grads, terms, offsets, 1.0))


CASES = {
    "layer_stats": layer_stats,
    "input_sums": input_sums,
    "abs_histogram": abs_histogram,
    "shrink": shrink,
    "rows": rows,
    "gate_stats_": gate_stats,
}
