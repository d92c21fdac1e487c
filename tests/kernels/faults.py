"""Faults put into the CUDA kernels on purpose; the cases are in fault_cases.py."""

from __future__ import annotations

from dataclasses import dataclass

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
        "an exchange of eight sums left out",
        "layer_stats",
        "v[0] += __shfl_xor_sync(kAllLanes, v[0], 2);",
        "",
        file="device",
    ),
    Fault(
        "no barrier before the ticket",
        "layer_stats",
        "__threadfence();\n  __syncthreads();\n  if (threadIdx.x == 0) {",
        "__threadfence();\n  if (threadIdx.x == 0) {",
        file="device",
    ),
    Fault(
        "no barrier after the ticket",
        "layer_stats",
        "  }\n  __syncthreads();\n  if (last) __threadfence();",
        "  }\n  if (last) __threadfence();",
        shows="EmulatorError: .*a lane of the mask has ended",
        file="device",
    ),
    Fault("ticket not reset", "layer_stats", "if (last) *ticket = 0;", "", file="device"),
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
        "always the first layout",
        "layer_stats",
        "behind) + number;",
        "behind);",
        file="table",
    ),
    Fault(
        "last element left out",
        "layer_stats",
        "runs.packs * kSize + me; i < n;",
        "runs.packs * kSize + me; i + 1 < n;",
        file="elements",
    ),
    Fault(
        "no elements before the first vector",
        "layer_stats",
        "(16 - misalignment(w)) % 16 / sizeof(T)",
        "0 * misalignment(w)",
        shows=UNALIGNED,
        file="elements",
    ),
    Fault(
        "alignment of the gradient not looked at",
        "layer_stats",
        "misalignment(w) != misalignment(g) || ",
        "",
        shows=UNALIGNED,
        file="elements",
    ),
    Fault(
        "odd vector left out",
        "layer_stats",
        "if (p < runs.packs) {",
        "if (p + threads < runs.packs) {",
        file="elements",
    ),
    Fault(
        "vectors counted twice",
        "abs_histogram",
        "p += 2 * threads",
        "p += threads",
        file="elements",
    ),
    Fault(
        "a filter's lanes added once too often",
        "layer_stats",
        "if (step == threads && valid",
        "if (step == 2 * threads && valid",
    ),
    Fault(
        "first filter of a warp written only",
        "layer_stats",
        "valid && lane % threads == 0",
        "valid && lane == 0",
    ),
    Fault(
        "no barrier before a block's totals",
        "layer_stats",
        "= part.nonfinite[c];\n  }\n  __syncthreads();",
        "= part.nonfinite[c];\n  }\n",
    ),
    Fault(
        "no barrier before a layer's totals",
        "layer_stats",
        "[k] = total;\n  }\n  __syncthreads();",
        "[k] = total;\n  }\n",
    ),
    Fault(
        "pieces of filters mixed up",
        "layer_stats",
        "(from + filter * job.pieces)",
        "(from + filter)",
    ),
    Fault(
        "a block too few waited for",
        "layer_stats",
        "(job.filters - 1) / together + 1",
        "(job.filters - 1) / together",
    ),
    Fault(
        "filters of pieces share a ticket",
        "layer_stats",
        "out.layers + split, job.pieces",
        "out.layers, job.pieces",
    ),
    Fault(
        "only some lanes count what is not finite",
        "layer_stats",
        "part.suspect = __ballot_sync(kAllLanes, part.suspect) != 0;",
        "",
        shows="EmulatorError: ",
    ),
    Fault(
        "no barrier before the channels' totals",
        "input_sums",
        "part[warp][lane] = sum;\n  __syncthreads();",
        "part[warp][lane] = sum;",
    ),
    Fault("every filter read by every warp", "input_sums", "f += warps", "f++"),
    Fault(
        "no barrier after clearing",
        "abs_histogram",
        "count[c] = 0;\n  __syncthreads();",
        "count[c] = 0;",
    ),
    Fault(
        "no barrier after counting",
        "abs_histogram",
        "histogram.flush();\n  __syncthreads();",
        "histogram.flush();",
    ),
    Fault(
        "last column not cleared",
        "abs_histogram",
        "c < columns; c += kHistogramThreads) count[c] = 0;",
        "c < columns - 1; c += kHistogramThreads) count[c] = 0;",
    ),
    Fault(
        "zeros not flushed",
        "abs_histogram",
        "if (own[0]) atomicAdd(columns + column_of(0), own[0]);",
        "",
    ),
    Fault(
        "zeros flushed below the first bin",
        "abs_histogram",
        "columns + column_of(0)",
        "columns",
    ),
    Fault(
        "one lane's zeros flushed",
        "abs_histogram",
        "{warp_sum(zeros), ",
        "{zeros, ",
    ),
    Fault(
        "what is beyond the bins not flushed",
        "abs_histogram",
        "if (own[2]) atomicAdd(columns + bins + 1, own[2]);",
        "",
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
        "__threadfence();\n  __syncthreads();\n  if (threadIdx.x == 0) {",
        "__threadfence();\n  if (threadIdx.x == 0) {",
        file="device",
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
        "out.ticket[1] = 0;",
        "",
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
        "lanes without a filter work on",
        "layer_stats",
        "valid ? job.length - first : 0",
        "job.length - first",
        shows=HEAP,
    ),
    Fault(
        "last piece of a filter not cut",
        "layer_stats",
        "rest < kStatsPiece ? rest : kStatsPiece",
        "rest < kStatsPiece && job.pieces == 1 ? rest : kStatsPiece",
        shows=HEAP,
    ),
    Fault(
        "lanes without a channel work on",
        "input_sums",
        "if (there && job.length > 0)",
        "if (job.length > 0)",
        shows=HEAP,
    ),
    Fault(
        "piece not cut at the end",
        "abs_histogram",
        "rest < kHistogramPiece ? rest : kHistogramPiece",
        "kHistogramPiece",
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
