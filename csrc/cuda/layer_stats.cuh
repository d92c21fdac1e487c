// layer_stats on a GPU; the equation is in csrc/cpu/layer_stats.cpp.
// Fused: ten reductions over two tensors, all layers, dtypes and totals in one launch. Reads every
// weight and gradient once (8 bytes an element in fp32); writes 36 bytes a filter, and 80 bytes of
// partial totals a block. Filters of up to kLong elements are summed by a warp each; longer ones in
// pieces, by a block each. The last block of a layer to finish (an integer ticket, which it resets)
// adds up the layer, in the order of its blocks: the bits are the same in every run.
#pragma once

#include "../core/stats.h"
#include "table.cuh"

namespace psap {

constexpr int kStatsThreads = 256;
constexpr int kStatsWarps = kStatsThreads / kWarp;
constexpr int64_t kLong = 8192;    // a lane adds up to 256 elements in float
constexpr int64_t kPiece = 65536;  // so does a thread
constexpr int kTotals = static_cast<int>(kLayerSums) + static_cast<int>(kCounts);

struct StatsJob {
  const void* w;
  const void* g;
  int64_t filters, length;
  int64_t first_filter, first_block, blocks;
  int64_t w_stride, g_stride;
  uint32_t pieces;  // of each filter; 0: a warp for each filter
  int32_t layer, dtype, dense;
  Strided inner;
};

struct StatsOutput {
  const float* tau;
  float* filter_sums;      // [6, F]
  int32_t* filter_counts;  // [3, F]
  double* layer_sums;      // [L, 7]
  int64_t* layer_counts;   // [L, 3]
  double* partial;         // [blocks, 10]
  unsigned int* ticket;    // [L], zero before and after
  int64_t filters, tau_stride;
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

// Elements from..to of one filter, shared by `workers` threads of which this is number `me`.
template <class L, bool kGrads>
__device__ __forceinline__ void add_range(const StatsJob& job, int64_t filter, int64_t from,
                                          int64_t to, int me, int workers, typename L::V tau,
                                          Lanes<ScalarArith<typename L::V>>& lanes) {
  using T = typename L::T;
  const T* w = static_cast<const T*>(job.w) + filter * job.w_stride;
  const T* g = kGrads ? static_cast<const T*>(job.g) + filter * job.g_stride : w;
  if (!job.dense) {
    for (int64_t i = from + me; i < to; i += workers) {
      int64_t a, b;
      job.inner.offsets(i, &a, &b);
      lanes.template add<kGrads>(L::value(w[a]), kGrads ? L::value(g[b]) : 0, tau);
    }
    return;
  }
  constexpr int kSize = Vector<T>::kSize;
  const unsigned skew = misalignment(w + from);
  if (skew == misalignment(g + from) && skew % sizeof(T) == 0) {
    const int64_t head = skew == 0 ? 0 : (16 - skew) / static_cast<int>(sizeof(T));
    const int64_t start = from + head < to ? from + head : to;
    if (from + me < start) {
      lanes.template add<kGrads>(L::value(w[from + me]), kGrads ? L::value(g[from + me]) : 0, tau);
    }
    const int64_t vectors = (to - start) / kSize;
    for (int64_t v = me; v < vectors; v += workers) {
      const Vector<T> x(w + start + v * kSize);
      const Vector<T> y(g + start + v * kSize);
#pragma unroll
      for (int i = 0; i < kSize; i++) {
        lanes.template add<kGrads>(L::value(x.element[i]), kGrads ? L::value(y.element[i]) : 0,
                                   tau);
      }
    }
    from = start + vectors * kSize;
  }
  for (int64_t i = from + me; i < to; i += workers) {
    lanes.template add<kGrads>(L::value(w[i]), kGrads ? L::value(g[i]) : 0, tau);
  }
}

// Values that are not finite, counted only where a sum shows that there are some.
template <class L, bool kGrads>
__device__ __forceinline__ void count_range(const StatsJob& job, int64_t filter, int64_t from,
                                            int64_t to, int me, int workers, double* total) {
  using T = typename L::T;
  const T* w = static_cast<const T*>(job.w) + filter * job.w_stride;
  const T* g = kGrads ? static_cast<const T*>(job.g) + filter * job.g_stride : w;
  int in_w = 0, in_g = 0;
  for (int64_t i = from + me; i < to; i += workers) {
    int64_t a = i, b = i;
    if (!job.dense) job.inner.offsets(i, &a, &b);
    in_w += L::nonfinite(w[a]);
    if (kGrads) in_g += L::nonfinite(g[b]);
  }
  total[kLayerSums + kNonfiniteWeight] = in_w;
  total[kLayerSums + kNonfiniteGrad] = in_g;
}

// The totals of one range over a warp, in total[10]; the same in every lane.
template <class L, bool kGrads>
__device__ __forceinline__ void warp_totals(const StatsJob& job, int64_t filter, int64_t from,
                                            int64_t to, int me, int workers, float tau,
                                            double* total) {
  Lanes<ScalarArith<typename L::V>> lanes;
  add_range<L, kGrads>(job, filter, from, to, me, workers, tau, lanes);
#pragma unroll
  for (int s = 0; s < kLayerSums; s++) total[s] = warp_sum(static_cast<double>(lanes.sum[s]));
  total[kLayerSums + kBelowTau] = warp_sum(lanes.below_tau);
  total[kLayerSums + kNonfiniteWeight] = total[kLayerSums + kNonfiniteGrad] = 0;
  const bool finite = total[kWeightAbs] <= 1.7e308 && total[kGradAbs] <= 1.7e308;
  if (finite) return;
  count_range<L, kGrads>(job, filter, from, to, me, workers, total);
  for (int c = kNonfiniteWeight; c <= kNonfiniteGrad; c++) {
    total[kLayerSums + c] = warp_sum(total[kLayerSums + c]);
  }
}

__device__ __forceinline__ void write_filter(const StatsOutput& out, int64_t filter,
                                             const double* total) {
  for (int s = 0; s < kFilterSums; s++) {
    out.filter_sums[s * out.filters + filter] = static_cast<float>(total[s]);
  }
  for (int c = 0; c < kCounts; c++) {
    out.filter_counts[c * out.filters + filter] = static_cast<int32_t>(total[kLayerSums + c]);
  }
}

// The layer's totals from those of its blocks, and its long filters from their pieces.
__device__ __forceinline__ void finish_layer(const StatsJob& job, const StatsOutput& out) {
  PSAP_SHARED(double, part, [kStatsWarps][kTotals]);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const double* partial = out.partial + job.first_block * kTotals;
  double sum[kTotals] = {};
  for (int64_t b = threadIdx.x; b < job.blocks; b += kStatsThreads) {
#pragma unroll
    for (int s = 0; s < kTotals; s++) sum[s] += __ldcg(partial + b * kTotals + s);
  }
#pragma unroll
  for (int s = 0; s < kTotals; s++) {
    const double total = warp_sum(sum[s]);
    if (lane == 0) part[warp][s] = total;
  }
  __syncthreads();
  if (threadIdx.x < kTotals) {
    double total = 0;
    for (int w = 0; w < kStatsWarps; w++) total += part[w][threadIdx.x];
    if (threadIdx.x < kLayerSums) {
      out.layer_sums[job.layer * kLayerSums + threadIdx.x] = total;
    } else {
      out.layer_counts[job.layer * kCounts + threadIdx.x - kLayerSums] =
          static_cast<int64_t>(total);
    }
  }
  if (job.pieces == 0) return;
  for (int64_t f = threadIdx.x; f < job.filters; f += kStatsThreads) {
    double total[kTotals] = {};
    for (uint32_t p = 0; p < job.pieces; p++) {
      for (int s = 0; s < kTotals; s++)
        total[s] += __ldcg(partial + (f * job.pieces + p) * kTotals + s);
    }
    write_filter(out, job.first_filter + f, total);
  }
}

template <class Table, bool kGrads>
__global__ void __launch_bounds__(kStatsThreads, 2)
    stats_kernel(PSAP_GRID_CONSTANT const Table table, const StatsOutput out) {
  PSAP_SHARED(double, part, [kStatsWarps][kTotals]);
  PSAP_SHARED(bool, last);
  const StatsJob& job = table.jobs()[find_job(table, blockIdx.x)];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const uint32_t block = static_cast<uint32_t>(blockIdx.x - job.first_block);
  const float tau = out.tau[job.layer * out.tau_stride];
  double total[kTotals] = {};
  with_dtype(job.dtype, [&](auto load) {
    using L = decltype(load);
    if (job.pieces == 0) {
      const int64_t filter = static_cast<int64_t>(block) * kStatsWarps + warp;
      if (filter >= job.filters) return;
      warp_totals<L, kGrads>(job, filter, 0, job.length, lane, kWarp, tau, total);
      if (lane == 0) write_filter(out, job.first_filter + filter, total);
    } else {
      const uint32_t filter = block / job.pieces;
      const int64_t from = (block - filter * job.pieces) * kPiece;
      const int64_t to = from + kPiece < job.length ? from + kPiece : job.length;
      warp_totals<L, kGrads>(job, filter, from, to, threadIdx.x, kStatsThreads, tau, total);
    }
  });
  if (lane == 0) {
    for (int s = 0; s < kTotals; s++) part[warp][s] = total[s];
  }
  __syncthreads();
  if (threadIdx.x < kTotals) {
    double sum = 0;
    for (int w = 0; w < kStatsWarps; w++) sum += part[w][threadIdx.x];
    out.partial[blockIdx.x * static_cast<int64_t>(kTotals) + threadIdx.x] = sum;
    __threadfence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(out.ticket + job.layer, 1u) == static_cast<unsigned>(job.blocks - 1);
    if (last) out.ticket[job.layer] = 0;
    __threadfence();
  }
  __syncthreads();
  if (last) finish_layer(job, out);
}

// Planning: which blocks do what, from shapes alone.
inline StatsJob plan_stats(const View& w, const View* g, int32_t layer, int64_t first_filter) {
  StatsJob job{};
  job.w = w.data;
  job.g = g ? g->data : nullptr;
  job.filters = w.sizes[0];
  job.first_filter = first_filter;
  job.w_stride = w.strides[0];
  job.g_stride = g ? g->strides[0] : 0;
  job.layer = layer;
  job.dtype = w.dtype;
  job.dense = describe_inner(w, g ? *g : w, 1, job.inner, job.length);
  if (job.length > INT32_MAX) throw std::runtime_error("a filter is too long for int32 counts");
  job.pieces = static_cast<uint32_t>(job.length > kLong ? (job.length + kPiece - 1) / kPiece : 0);
  // At least one: a layer without filters has totals, too.
  job.blocks =
      job.pieces ? job.filters * job.pieces : (job.filters + kStatsWarps - 1) / kStatsWarps;
  if (job.blocks == 0) job.blocks = 1;
  return job;
}

}  // namespace psap
