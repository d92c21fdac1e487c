// abs_histogram on a GPU; the definition is in csrc/cpu/abs_histogram.cpp.
// Fused: all tensors in one launch. Reads every element once; each block counts in shared memory
// and adds what is not zero to the result with integer atomics, whose order does not matter. The
// result must be zero before (one memset).
#pragma once

#include "elements.cuh"
#include "table.cuh"

namespace psap {

constexpr int kHistogramThreads = 256;
constexpr int64_t kHistogramPiece = 1 << 14;  // elements of a block
constexpr int kMaxColumns = 2050;

struct HistogramJob {
  const void* data;
  int64_t length;
  int32_t first_block, tensor, dtype;
  int32_t layout;  // -1: one dense run
};

struct HistogramBins {
  const float* scales;
  unsigned long long* counts;  // [L, bins + 2]
  int64_t scale_stride;
  int32_t first, shift, bins;
};

// The counts of a block are in shared memory. But two columns can hold nearly everything: the zeros
// of a pruned tensor, and what a narrow range leaves out. Lanes that add to one address wait for
// one another, so each thread keeps those counts to itself.
struct Histogram {
  unsigned int* columns;
  float scale;
  int32_t first, shift, bins;
  unsigned int zeros = 0, below = 0, beyond = 0;

  __device__ __forceinline__ int column_of(int32_t key) const {
    if (key < first) return 0;
    const int32_t bin = (key - first) >> shift;
    return bin < bins ? bin + 1 : bins + 1;
  }

  __device__ __forceinline__ void add(float value) {
    const float magnitude = __fmul_rn(fabsf(value), scale);
    const int32_t key = magnitude != magnitude
                            ? INT32_MAX  // NaNs differ in their bits
                            : static_cast<int32_t>(__float_as_uint(magnitude) & 0x7fffffffu);
    const int column = column_of(key);
    if (key == 0) {
      zeros++;
    } else if (column == 0) {
      below++;
    } else if (column > bins) {
      beyond++;
    } else {
      atomicAdd(columns + column, 1u);
    }
  }

  // Brings the threads' own counts to shared memory, by one atomic a warp.
  __device__ __forceinline__ void flush() const {
    const unsigned int own[] = {warp_sum(zeros), warp_sum(below), warp_sum(beyond)};
    if (threadIdx.x % kWarp != 0) return;
    if (own[0]) atomicAdd(columns + column_of(0), own[0]);
    if (own[1]) atomicAdd(columns, own[1]);
    if (own[2]) atomicAdd(columns + bins + 1, own[2]);
  }
};

template <class Table>
__global__ void __launch_bounds__(kHistogramThreads, 6)
    histogram_kernel(PSAP_GRID_CONSTANT const Table table, const HistogramBins bins) {
  PSAP_SHARED(unsigned int, count, [kMaxColumns]);
  const int columns = bins.bins + 2;
  for (int c = threadIdx.x; c < columns; c += kHistogramThreads) count[c] = 0;
  __syncthreads();
  const HistogramJob job = jobs_of(table)[find_job(table, blockIdx.x)];
  const float scale = __ldg(bins.scales + job.tensor * bins.scale_stride);
  const int64_t from = (blockIdx.x - job.first_block) * kHistogramPiece, rest = job.length - from;
  const int n = static_cast<int>(rest < kHistogramPiece ? rest : kHistogramPiece);
  Histogram histogram{count, scale, bins.first, bins.shift, bins.bins};
  with_dtype(job.dtype, [&](auto load) {
    using L = decltype(load);
    using T = typename L::T;
    const T* x = static_cast<const T*>(job.data);
    for_each_element<L, false>(
        x, x, layout_of(table, job.layout), from, n, threadIdx.x, kHistogramThreads,
        [&](T value, T) { histogram.add(static_cast<float>(L::value(value))); });
  });
  histogram.flush();
  __syncthreads();
  for (int c = threadIdx.x; c < columns; c += kHistogramThreads) {
    if (count[c]) {
      atomicAdd(bins.counts + job.tensor * static_cast<int64_t>(columns) + c,
                static_cast<unsigned long long>(count[c]));
    }
  }
}

inline void plan_histogram(Plan<HistogramJob>& plan, const View& x, int32_t tensor) {
  const PairLayout all = merged(x, x, 0);
  HistogramJob job{};
  job.data = x.data;
  job.length = all.count();
  job.tensor = tensor;
  job.dtype = x.dtype;
  if (job.length == 0) return;
  job.layout = all.dense() ? -1 : plan.add_layout(describe(all));
  plan.add(job, (job.length + kHistogramPiece - 1) / kHistogramPiece);
}

}  // namespace psap
