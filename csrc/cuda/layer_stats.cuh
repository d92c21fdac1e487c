// layer_stats on a GPU; the equation is in csrc/cpu/layer_stats.cpp.
// Fused: ten reductions over two tensors, all layers, dtypes and totals in one launch. Reads every
// weight and gradient once (8 bytes an element in fp32; a thread that met a value that is not
// finite reads its own once more); writes 36 bytes a filter, and 80 bytes of partial totals a
// block. Short filters share a warp, long ones have a block for every piece. What one block cannot
// know is added up by the last one to finish (an integer ticket for every layer and every filter of
// several pieces): in an order that depends on shapes alone, so the bits are the same in every run.
#pragma once

#include "../core/stats.h"
#include "elements.cuh"
#include "input_sums.cuh"

namespace psap {

constexpr int kStatsWarps = kStatsThreads / kWarp;
// What is known of a filter, a piece or a layer, all in double: the sums, then the counts.
constexpr int kTotals = static_cast<int>(kLayerSums) + static_cast<int>(kCounts);
constexpr int kFirstNonfinite = static_cast<int>(kLayerSums) + static_cast<int>(kNonfiniteWeight);

struct StatsOutput {
  const float* tau;
  float* filter_sums;      // [6, F]
  int32_t* filter_counts;  // [3, F]
  double* layer_sums;      // [L, 7]
  int64_t* layer_counts;   // [L, 3]
  float* input_sums;       // [I]
  double* partial;         // [blocks + split, 10]
  unsigned int* ticket;    // [L + split], zero before and after
  int64_t filters, tau_stride;
  int32_t layers, blocks;
};

// Scalar arithmetic for the sums that all backends share.
template <class T>
struct ScalarArith {
  using V = T;
  using I = int32_t;
  static __device__ __forceinline__ V absolute(V x) { return fabs(x); }
  static __device__ __forceinline__ I below(V x, V limit) { return x < limit; }
};
template <>
struct ScalarArith<float> {
  using V = float;
  using I = int32_t;
  static __device__ __forceinline__ V absolute(V x) { return fabsf(x); }
  static __device__ __forceinline__ I below(V x, V limit) { return x < limit; }
};

// What one thread, a warp or a part of it has found.
struct Part {
  double sum[kLayerSums + 1];  // the last one: below tau
  int nonfinite[2];            // among the weights, among the gradients
  bool suspect;                // a sum is not finite: there may be such values
};

// The elements of one thread. They are read again, to be counted, only where a sum is not finite.
template <class L, bool kGrads>
__device__ __forceinline__ void sum_part(const typename L::T* w, const typename L::T* g,
                                         const Strided* layout, int64_t first, int n, int me,
                                         int threads, float tau, Part& part) {
  using T = typename L::T;
  using V = typename L::V;
  Lanes<ScalarArith<V>> lanes;
  for_each_element<L, kGrads>(w, g, layout, first, n, me, threads, [&](T x, T y) {
    lanes.template add<kGrads>(L::value(x), kGrads ? L::value(y) : V{}, tau);
  });
#pragma unroll
  for (int s = 0; s < kLayerSums; s++) part.sum[s] = lanes.sum[s];
  part.sum[kLayerSums] = lanes.below_tau;
  const V magnitudes = lanes.sum[kWeightAbs] + lanes.sum[kGradAbs];
  part.suspect = !(magnitudes - magnitudes == 0);
  if (!part.suspect) return;
  for_each_element<L, kGrads>(w, g, layout, first, n, me, threads, [&](T x, T y) {
    part.nonfinite[0] += L::nonfinite(x);
    if (kGrads) part.nonfinite[1] += L::nonfinite(y);
  });
}

// Row `row` of the totals of a filter; the sum of w is kept per layer only.
__device__ __forceinline__ void write_row(const StatsOutput& out, int64_t filter, int row,
                                          double value) {
  if (row < kFilterSums) {
    out.filter_sums[row * out.filters + filter] = static_cast<float>(value);
  } else if (row >= kLayerSums) {
    out.filter_counts[(row - kLayerSums) * out.filters + filter] = static_cast<int32_t>(value);
  }
}

__device__ __forceinline__ void write_filter(const StatsOutput& out, int64_t filter,
                                             const Part& part) {
#pragma unroll
  for (int row = 0; row <= kLayerSums; row++) write_row(out, filter, row, part.sum[row]);
  for (int n = 0; n < 2; n++) write_row(out, filter, kFirstNonfinite + n, part.nonfinite[n]);
}

// Adds up a warp of several filters, and writes those on the way. `threads` have one, < kWarp.
__device__ __forceinline__ void reduce_short(const StatsOutput& out, Part& part, int threads,
                                             int64_t filter, bool valid, double* totals) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll 1
  for (int step = 1; step < kWarp; step *= 2) {
    if (step == threads && valid && lane % threads == 0) write_filter(out, filter, part);
#pragma unroll
    for (int s = 0; s <= kLayerSums; s++) {
      part.sum[s] += __shfl_xor_sync(kAllLanes, part.sum[s], step);
    }
    if (!part.suspect) continue;
    for (int n = 0; n < 2; n++) {
      part.nonfinite[n] += __shfl_xor_sync(kAllLanes, part.nonfinite[n], step);
    }
  }
  if (lane != 0) return;
#pragma unroll
  for (int s = 0; s <= kLayerSums; s++) totals[s] = part.sum[s];
}

// Adds up a warp that has one filter, or a part of one; writes it if it is whole.
__device__ __forceinline__ void reduce_long(const StatsOutput& out, Part& part, int64_t filter,
                                            bool whole, double* totals) {
  const int lane = threadIdx.x % kWarp;
  const double sum = warp_sum8(part.sum, lane);
  if (part.suspect) {
    for (int n = 0; n < 2; n++) part.nonfinite[n] = warp_sum(part.nonfinite[n]);
  }
  if (lane % 4 == 0) {
    totals[lane / 4] = sum;
    if (whole) write_row(out, filter, lane / 4, sum);
  }
  if (lane == 0 && whole) {
    for (int n = 0; n < 2; n++) write_row(out, filter, kFirstNonfinite + n, part.nonfinite[n]);
  }
}

// The sum of the block, from those of its warps: row `threadIdx.x` of it, in the first threads.
__device__ __forceinline__ double block_total(const double (*warps)[kTotals]) {
  double total = 0;
  if (threadIdx.x < kTotals) {
    for (int w = 0; w < kStatsWarps; w++) total += warps[w][threadIdx.x];
  }
  return total;
}

// The sum of `count` rows that other blocks have written, as block_total has it.
__device__ __forceinline__ double sum_rows(const double* rows, int count,
                                           double (*warps)[kTotals]) {
  double sum[kTotals] = {};
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kStatsThreads) {
#pragma unroll
    for (int k = 0; k < kTotals; k++) sum[k] += __ldcg(rows + int64_t{kTotals} * i + k);
  }
#pragma unroll
  for (int k = 0; k < kTotals; k++) {
    const double total = warp_sum(sum[k]);
    if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp][k] = total;
  }
  __syncthreads();
  return block_total(warps);
}

// Adds up the pieces of a filter, and the layer, where this block is the last one that they waited
// for. row: of the block's own total, which is in memory already.
__device__ __forceinline__ void finish(const StatsJob& job, const StatsOutput& out, int layer,
                                       int64_t filter, double (*warps)[kTotals]) {
  const int row = threadIdx.x;
  // The rows that make up the layer: its blocks, or its filters if those have pieces.
  int64_t from = job.first_block;
  const int together = kStatsThreads >> job.log_threads;
  int count = job.filters <= together ? 1 : (job.filters - 1) / together + 1;
  if (job.pieces > 1 && job.filters > 0) {
    const int64_t split = job.first_split + filter;
    if (!last_ticket(out.ticket + out.layers + split, job.pieces)) return;
    const double* pieces = out.partial + kTotals * (from + filter * job.pieces);
    const double total = sum_rows(pieces, job.pieces, warps);
    if (row < kTotals) {
      out.partial[kTotals * (out.blocks + split) + row] = total;
      write_row(out, job.first_output + filter, row, total);
    }
    from = out.blocks + job.first_split;
    count = job.filters;
  }
  if (!last_ticket(out.ticket + layer, count)) return;
  const double total = sum_rows(out.partial + kTotals * from, count, warps);
  if (row < kLayerSums) {
    out.layer_sums[int64_t{layer} * kLayerSums + row] = total;
  } else if (row < kTotals) {
    out.layer_counts[int64_t{layer} * kCounts + row - kLayerSums] = static_cast<int64_t>(total);
  }
}

template <class Table, bool kGrads, bool kInputs>
__global__ void __launch_bounds__(kStatsThreads, Table::kInMemory ? 3 : 4)
    stats_kernel(PSAP_GRID_CONSTANT const Table table, PSAP_GRID_CONSTANT const StatsOutput out) {
  PSAP_SHARED(double, warps, [kStatsWarps][kTotals]);
  const int layer = find_job(table, blockIdx.x);
  const StatsJob job = jobs_of(table)[layer];
  const Strided* layout = layout_of(table, job.layout);
  const uint32_t block = static_cast<uint32_t>(blockIdx.x - job.first_block);
  if (kInputs && layer >= out.layers) return sum_inputs(job, *layout, block, out.input_sums);

  // A block has one piece of one filter, or several whole filters.
  const int threads = 1 << job.log_threads, me = threadIdx.x & (threads - 1);
  const int64_t filter = job.log_threads == 8
                             ? block / static_cast<uint32_t>(job.pieces)
                             : (int64_t{block} * kStatsThreads + threadIdx.x) >> job.log_threads;
  const int64_t first = job.pieces > 1 ? (block - filter * job.pieces) * kStatsPiece : 0;
  const bool valid = filter < job.filters;
  const int64_t rest = valid ? job.length - first : 0;
  const int n = static_cast<int>(rest < kStatsPiece ? rest : kStatsPiece);
  const float tau = __ldg(out.tau + layer * out.tau_stride);
  Part part{};
  if (n > 0) {
    with_dtype(job.dtype, [&](auto load) {
      using L = decltype(load);
      using T = typename L::T;
      const T* w = static_cast<const T*>(job.w) + filter * job.w_stride;
      const T* g = kGrads ? static_cast<const T*>(job.g) + filter * job.g_stride : w;
      sum_part<L, kGrads>(w, g, layout, first, n, me, threads, tau, part);
    });
  }
  part.suspect = __ballot_sync(kAllLanes, part.suspect) != 0;
  double* totals = warps[threadIdx.x / kWarp];
  const int64_t output = job.first_output + filter;
  if (threads < kWarp) {
    reduce_short(out, part, threads, output, valid, totals);
  } else {
    reduce_long(out, part, output, threads == kWarp && valid, totals);
  }
  if (threadIdx.x % kWarp == 0) {
    for (int c = 0; c < 2; c++) totals[kFirstNonfinite + c] = part.nonfinite[c];
  }
  __syncthreads();
  const double total = block_total(warps);
  if (threadIdx.x < kTotals) {
    out.partial[int64_t{kTotals} * blockIdx.x + threadIdx.x] = total;
    if (threads == kStatsThreads && job.pieces == 1 && valid) {
      write_row(out, output, threadIdx.x, total);
    }
  }
  finish(jobs_of(table)[layer], out, layer, filter, warps);
}

template <class Table, class Stream>
void launch_stats(bool grads, bool inputs, const Table& table, const StatsOutput& out,
                  int64_t blocks, Stream stream) {
  if (inputs) {
    PSAP_LAUNCH((stats_kernel<Table, true, true>), blocks, kStatsThreads, stream, table, out);
  } else if (grads) {
    PSAP_LAUNCH((stats_kernel<Table, true, false>), blocks, kStatsThreads, stream, table, out);
  } else {
    PSAP_LAUNCH((stats_kernel<Table, false, false>), blocks, kStatsThreads, stream, table, out);
  }
}

}  // namespace psap
