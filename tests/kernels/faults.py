"""Faults put into the CUDA kernels on purpose, and small cases that must notice them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from emulation import Emulated
from test_gate_stats import state
from test_layer_stats import check, make

from psap_kernels import LayerStats, reference

WRONG, UNALIGNED = "AssertionError", "EmulatorError: an access is not aligned"
HEAP = "AddressSanitizer: heap-buffer-overflow"


@dataclass(frozen=True)
class Fault:
    """A text of one file that occurs once, what replaces it, and how that shows."""

    name: str
    op: str
    old: str
    new: str
    shows: str = WRONG
    file: str = ""  # where it is not the op's own; then it concerns all ops

    @property
    def path(self) -> str:
        return f"cuda/{self.file or self.op}.cuh"


def layer_stats(gpu: Emulated) -> None:
    """Both kinds of filters, all alignments, strides that differ, many blocks in a layer."""
    shapes = [(40, 3, 3, 3), (9, 37), (5, 4, 3, 3), (9, 12), (2, 70_001)]
    weights = [make(s, torch.float32) for s in shapes]
    grads = [make(s, torch.float32, seed=1) for s in shapes]
    weights[2] = weights[2].contiguous(memory_format=torch.channels_last)
    grads[3] = torch.full((9 * 12 + 1,), math.nan)[1:].view(9, 12).copy_(grads[3])
    tau = torch.linspace(0.2, 1, len(shapes))
    out = gpu.layer_stats(weights, grads, tau)
    check(weights, grads, tau, LayerStats(*out[:4], tuple(w.shape for w in weights)))


def input_sums(gpu: Emulated) -> None:
    w, g = [make((9, 37, 2), torch.float32)], [make((9, 37, 2), torch.float32, seed=1)]
    got = gpu.layer_stats(w, g, torch.ones(1), True)[4]
    want = reference.layer_stats(w, g, torch.ones(1), True)[4]
    torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-6)


def abs_histogram(gpu: Emulated) -> None:
    x = make((66_003,), torch.float32)
    tensors = [x, x[1:302], x[:300].view(30, 10)[:, ::3]]
    scales = torch.tensor([1.0, 0.5, 2.0])
    got = gpu.abs_histogram(tensors, scales, 1 << 29, 20, 300)
    assert torch.equal(got, reference.abs_histogram(tensors, scales, 1 << 29, 20, 300))


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

# Seen by the emulator itself.
FAULTS = [
    Fault(
        "short shuffle tree",
        "layer_stats",
        "for (int step = kWarp / 2; step > 0; step /= 2)",
        "for (int step = kWarp / 2; step > 1; step /= 2)",
        file="device",
    ),
    Fault(
        "strides swapped",
        "layer_stats",
        "second += at * b[d];",
        "second += at * a[d];",
        file="device",
    ),
    Fault(
        "wrong layer looked up",
        "layer_stats",
        "first_block <= block",
        "first_block < block",
        file="table",
    ),
    Fault(
        "no barrier before a block's totals",
        "layer_stats",
        "part[warp][s] = total[s];\n  }\n  __syncthreads();",
        "part[warp][s] = total[s];\n  }\n",
    ),
    Fault(
        "no barrier before a layer's totals",
        "layer_stats",
        "part[warp][s] = total;\n  }\n  __syncthreads();",
        "part[warp][s] = total;\n  }\n",
    ),
    Fault(
        "no barrier before the ticket",
        "layer_stats",
        "    __threadfence();\n  }\n  __syncthreads();\n  if (threadIdx.x == 0) {",
        "    __threadfence();\n  }\n  if (threadIdx.x == 0) {",
    ),
    Fault(
        "no barrier after the ticket",
        "layer_stats",
        "    __threadfence();\n  }\n  __syncthreads();\n  if (last) finish_layer",
        "    __threadfence();\n  }\n  if (last) finish_layer",
        shows="EmulatorError: .*a lane of the mask has ended",
    ),
    Fault(
        "ticket not reset",
        "layer_stats",
        "if (last) out.ticket[job.layer] = 0;",
        "",
    ),
    Fault(
        "last element left out",
        "layer_stats",
        "i < to; i += workers) {\n    lanes.template add<kGrads>(L::value(w[i])",
        "i + 1 < to; i += workers) {\n    lanes.template add<kGrads>(L::value(w[i])",
    ),
    Fault(
        "no elements before the first vector",
        "layer_stats",
        "skew == 0 ? 0 : (16 - skew) / static_cast<int>(sizeof(T))",
        "0 * skew",
        shows=UNALIGNED,
    ),
    Fault(
        "alignment of the gradient not looked at",
        "layer_stats",
        "skew == misalignment(g + from) && ",
        "",
        shows=UNALIGNED,
    ),
    Fault(
        "pieces of filters mixed up",
        "layer_stats",
        "(f * job.pieces + p)",
        "(p * job.filters + f)",
    ),
    Fault(
        "no barrier before the channels' totals",
        "input_sums",
        "part[warp][lane] = sum;\n  __syncthreads();",
        "part[warp][lane] = sum;",
    ),
    Fault(
        "no barrier after clearing",
        "abs_histogram",
        "count[c] = 0;\n  __syncthreads();",
        "count[c] = 0;",
    ),
    Fault(
        "no barrier after counting",
        "abs_histogram",
        "  });\n  __syncthreads();",
        "  });",
    ),
    Fault(
        "last column not cleared",
        "abs_histogram",
        "c < columns; c += kHistogramThreads) count[c] = 0;",
        "c < columns - 1; c += kHistogramThreads) count[c] = 0;",
    ),
    Fault(
        "alignment not looked at",
        "abs_histogram",
        "job.dense && misalignment(x + from) == 0",
        "job.dense",
        shows=UNALIGNED,
    ),
    Fault(
        "vectors counted twice",
        "abs_histogram",
        "done = from + vectors * kSize;",
        "done = from + vectors;",
    ),
    Fault(
        "last word left out",
        "shrink",
        "vectors * kSize + threadIdx.x; i < count;",
        "vectors * kSize + threadIdx.x; i + 1 < count;",
    ),
    Fault(
        "place in a channels_last kernel ignored",
        "shrink",
        " + group * job.from_group",
        "",
    ),
    Fault(
        "strides of gaps swapped",
        "shrink",
        "offsets(element, &unused, &at)",
        "offsets(element, &at, &unused)",
    ),
    Fault(
        "next cell not looked up",
        "shrink",
        "if (++within == job.words) within = 0, cell++;",
        "if (++within == job.words) within = 0;",
    ),
    Fault(
        "next row not looked up",
        "shrink",
        "group == job.groups) group = 0, row++;",
        "group == job.groups) group = 0;",
    ),
    Fault(
        "channel index not checked",
        "shrink",
        "*bad |= static_cast<uint64_t>(input) >= static_cast<uint64_t>(job.size1);",
        "",
        shows="no trap",
    ),
    Fault(
        "last word left out",
        "rows",
        "i < count; i += team) to[i]",
        "i + 1 < count; i += team) to[i]",
    ),
    Fault(
        "alignment of the saved rows not looked at",
        "rows",
        "from == nullptr || misalignment(to) == misalignment(from)",
        "true",
        shows=UNALIGNED,
    ),
    Fault(
        "row not checked",
        "rows",
        "if (row < 0 || row >= job.size) __trap();",
        "",
        shows="no trap",
    ),
    Fault(
        "no barrier before the ticket",
        "gate_stats_",
        "    __threadfence();\n  }\n  __syncthreads();\n  if (threadIdx.x == 0) {",
        "    __threadfence();\n  }\n  if (threadIdx.x == 0) {",
    ),
    Fault(
        "no barrier before the flag is reset",
        "gate_stats_",
        "__ldcg(out.before + at);\n  }\n  __syncthreads();",
        "__ldcg(out.before + at);\n  }\n",
    ),
    Fault(
        "sums not kept",
        "gate_stats_",
        "out.before[at] = before;",
        "",
    ),
    Fault(
        "flag not reset",
        "gate_stats_",
        "out.ticket[0] = out.ticket[1] = 0;",
        "out.ticket[0] = 0;",
    ),
    Fault(
        "lanes without a term leave",
        "gate_stats_",
        "const bool there = t + me < end;",
        "const bool there = t + me < end;\n    if (!there) break;",
        shows="EmulatorError: .*other lanes are at",
    ),
    Fault(
        "half of a warp's stride",
        "gate_stats_",
        "me, kWarp);",
        "me, kWarp / 2);",
    ),
    Fault(
        "end of the terms not checked",
        "gate_stats_",
        "if (channel == out.channels - 1 && end != out.count) __trap();",
        "",
        shows="no trap",
    ),
]

# Seen by the sanitizers.
MEMORY_FAULTS = [
    Fault(
        "warps without a filter work on",
        "layer_stats",
        "if (filter >= job.filters) return;",
        "",
        shows=HEAP,
    ),
    Fault(
        "piece not cut at the end",
        "abs_histogram",
        "from + kHistogramPiece < job.length ? from + kHistogramPiece : job.length",
        "from + kHistogramPiece",
        shows=HEAP,
    ),
    Fault(
        "no words before the first vector",
        "shrink",
        "uint32_t head = (16 - misalignment(out)) % 16 / static_cast<uint32_t>(sizeof(W));",
        "uint32_t head = 0;",
        shows="misaligned address",
    ),
    Fault(
        "one word more",
        "rows",
        "i < count; i += team) to[i]",
        "i <= count; i += team) to[i]",
        shows=HEAP,
    ),
    Fault(
        "terms read by lanes that have none",
        "gate_stats_",
        "there ? t + me : begin",
        "t + me",
        shows=HEAP,
    ),
]
