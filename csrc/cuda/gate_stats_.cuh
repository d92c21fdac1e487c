// gate_stats_ on a GPU; the definition is in csrc/cpu/gate_stats_.cpp.
// Fused: all channels of a network in one launch. Reads the rows that terms name, once, and 12
// bytes a term; reads 16 bytes a channel and writes 32. Where all rows are short (affine pairs of
// norms), a few lanes have a channel, one for each term; else a warp has one, and multiplies long
// rows together, 16 bytes a lane. Every block adds to the running sums at once, and keeps what they
// were; should one derivative not be finite, the last block to finish puts all of them back.
#pragma once

#include "table.cuh"

namespace psap {

constexpr int kGateThreads = 128;
constexpr int64_t kShortRow = 8;
constexpr int kWarpBits = 5;

// Two tensors whose rows are multiplied; strides in elements.
struct GateJob {
  const void* value;
  const void* grad;
  int64_t values, grads, value_stride, grad_stride, length;
  int32_t dtype;
  int32_t layout;  // -1: dense rows
};

struct GateOutput {
  double* sums;     // [2, C]
  long long* seen;  // [2]
  const int32_t* terms;
  const int32_t* offsets;
  double* before;           // scratch, [2, C]: the sums as they were
  unsigned int* ticket;     // [2]: ticket and flag, zero before and after
  int64_t channels, count;  // count: terms
  double scale;
  int32_t lane_bits;  // 2^lane_bits lanes have a channel
};

// The part of lane `me` of `lanes` in a product of two rows. Its order is a function of shapes,
// strides and alignment.
__device__ __forceinline__ double dot_range(const GateJob& job, const Strided* layout, int64_t i,
                                            int64_t j, int me, int lanes) {
  double sum = 0;
  with_dtype(job.dtype, [&](auto load) {
    using L = decltype(load);
    using T = typename L::T;
    const T* v = static_cast<const T*>(job.value) + i * job.value_stride;
    const T* g = static_cast<const T*>(job.grad) + j * job.grad_stride;
    const auto add = [&](T a, T b) {
      sum += static_cast<double>(L::value(a)) * static_cast<double>(L::value(b));
    };
    int64_t done = 0;
    if (lanes == kWarp && !layout && misalignment(v) == misalignment(g)) {
      constexpr int kSize = Vector<T>::kSize;
      int64_t head = (16 - misalignment(v)) % 16 / sizeof(T);
      if (head > job.length) head = job.length;
      if (me < head) add(v[me], g[me]);
      const int64_t vectors = (job.length - head) / kSize;
#pragma unroll 2
      for (int64_t k = me; k < vectors; k += kWarp) {
        const Vector<T> a(v + head + k * kSize), b(g + head + k * kSize);
#pragma unroll
        for (int e = 0; e < kSize; e++) add(a.element[e], b.element[e]);
      }
      done = head + vectors * kSize;
    }
    for (int64_t k = done + me; k < job.length; k += lanes) {
      int64_t a = k, b = k;
      if (layout) layout->offsets(k, &a, &b);
      add(v[a], g[b]);
    }
  });
  return sum;
}

// One term of a channel; traps where it names what is not there.
struct Term {
  int32_t pair, i, j;

  template <class Table>
  __device__ __forceinline__ Term(const Table& table, const GateOutput& out, int64_t t) {
    const int32_t* term = out.terms + 3 * t;
    pair = __ldg(term), i = __ldg(term + 1), j = __ldg(term + 2);
    if (pair < 0 || pair >= table.count) __trap();
    const GateJob& job = jobs_of(table)[pair];
    if (i < 0 || i >= job.values || j < 0 || j >= job.grads) __trap();
  }
};

// The part of lane `me` in the terms begin ... end - 1. Rows are long only where a channel has all
// lanes of a warp, which are here together then.
template <class Table>
__device__ __forceinline__ double add_terms(const Table& table, const GateOutput& out,
                                            int64_t begin, int64_t end, int me, int lanes) {
  double sum = 0;
  for (int64_t t = begin; t < end; t += lanes) {
    const bool there = t + me < end;
    const Term term(table, out, there ? t + me : begin);
    const GateJob& job = jobs_of(table)[term.pair];
    const bool is_long = lanes == kWarp && job.length > kShortRow;
    if (there && !is_long) {
      sum += dot_range(job, layout_of(table, job.layout), term.i, term.j, 0, 1);
    }
    if (lanes != kWarp) continue;
    for (unsigned todo = __ballot_sync(kAllLanes, there && is_long); todo; todo &= todo - 1) {
      const int from = __ffs(todo) - 1;
      const GateJob& theirs = jobs_of(table)[__shfl_sync(kAllLanes, term.pair, from)];
      const int32_t i = __shfl_sync(kAllLanes, term.i, from);
      const int32_t j = __shfl_sync(kAllLanes, term.j, from);
      sum += dot_range(theirs, layout_of(table, theirs.layout), i, j, me, kWarp);
    }
  }
  return sum;
}

// Adds the derivative of a channel to the running sums.
__device__ __forceinline__ void observe(const GateOutput& out, int64_t channel, double d) {
  for (int moment = 0; moment < 2; moment++) {
    const int64_t at = moment * out.channels + channel;
    const double before = out.sums[at];
    out.before[at] = before;
    out.sums[at] = before + (moment ? d * d : d);
  }
  if (!(fabs(d) <= 1.7976931348623157e308)) atomicOr(out.ticket + 1, 1u);
}

template <class Table>
__global__ void __launch_bounds__(kGateThreads, 8)
    gate_kernel(PSAP_GRID_CONSTANT const Table table, const GateOutput out) {
  const int lanes = 1 << out.lane_bits, me = threadIdx.x & (lanes - 1);
  const int64_t channel =
      (static_cast<int64_t>(blockIdx.x) * kGateThreads + threadIdx.x) >> out.lane_bits;
  const bool there = channel < out.channels;
  double sum = 0;
  if (there) {
    const int32_t begin = __ldg(out.offsets + channel), end = __ldg(out.offsets + channel + 1);
    if (begin < 0 || end < begin || end > out.count) __trap();
    if (channel == 0 && begin != 0) __trap();
    if (channel == out.channels - 1 && end != out.count) __trap();
    sum = add_terms(table, out, begin, end, me, lanes);
  }
  for (int step = lanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  if (there && me == 0) observe(out, channel, sum * out.scale);
  if (!last_ticket(out.ticket, gridDim.x)) return;
  const bool finite = atomicOr(out.ticket + 1, 0u) == 0;
#pragma unroll 1
  for (int64_t at = threadIdx.x; !finite && at < 2 * out.channels; at += kGateThreads) {
    out.sums[at] = __ldcg(out.before + at);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    out.seen[finite ? 0 : 1] += 1;
    out.ticket[1] = 0;
  }
}

inline void plan_gate(Plan<GateJob>& plan, const View& value, const View& grad) {
  GateJob job{};
  job.value = value.data;
  job.grad = grad.data;
  job.values = value.sizes[0];
  job.grads = grad.sizes[0];
  job.value_stride = value.strides[0];
  job.grad_stride = grad.strides[0];
  job.dtype = value.dtype;
  const PairLayout row = merged(value, grad, 1);
  job.length = row.count();
  job.layout = row.dense() ? -1 : plan.add_layout(describe(row));
  plan.jobs.push_back(job);  // terms name them, blocks do not
}

// A warp for a channel if there are long rows, else a lane for each of its terms on average.
inline int32_t gate_lane_bits(const Plan<GateJob>& plan, int64_t channels, int64_t terms) {
  for (const GateJob& job : plan.jobs) {
    if (job.length > kShortRow) return kWarpBits;
  }
  int32_t bits = 0;
  while (bits < kWarpBits && (channels << bits) < terms) bits++;
  return bits;
}

inline int64_t gate_blocks(int64_t channels, int32_t lane_bits) {
  const int64_t each = kGateThreads >> lane_bits;
  // At least one, which counts the observation.
  return channels ? (channels + each - 1) / each : 1;
}

}  // namespace psap
