// abs_histogram on a GPU; the definition is in csrc/cpu/abs_histogram.cpp.
// Fused: all tensors in one launch. Reads every element once; each block counts in shared memory
// and adds what is not zero to the result with integer atomics, whose order does not matter. The
// result must be zero before (one memset).
#pragma once

#include "table.cuh"

namespace psap {

constexpr int kHistogramThreads = 256;
constexpr int64_t kHistogramPiece = 1 << 16;
constexpr int kMaxColumns = 2050;

struct HistogramJob {
  const void* data;
  int64_t length, first_block, blocks;
  int32_t tensor, dtype, dense;
  Strided inner;
};

struct HistogramBins {
  const float* scales;
  unsigned long long* counts;  // [L, bins + 2]
  int64_t scale_stride;
  int32_t first, shift, bins;
};

__device__ __forceinline__ int column_of(float value, float scale, const HistogramBins& bins) {
  const float magnitude = __fmul_rn(fabsf(value), scale);
  const int32_t key = magnitude != magnitude
                          ? INT32_MAX  // NaNs differ in their bits
                          : static_cast<int32_t>(__float_as_uint(magnitude) & 0x7fffffffu);
  if (key < bins.first) return 0;
  const int32_t bin = (key - bins.first) >> bins.shift;
  return bin < bins.bins ? bin + 1 : bins.bins + 1;
}

template <class Table>
__global__ void __launch_bounds__(kHistogramThreads)
    histogram_kernel(PSAP_GRID_CONSTANT const Table table, const HistogramBins bins) {
  PSAP_SHARED(unsigned int, count, [kMaxColumns]);
  const HistogramJob& job = table.jobs()[find_job(table, blockIdx.x)];
  const int columns = bins.bins + 2;
  for (int c = threadIdx.x; c < columns; c += kHistogramThreads) count[c] = 0;
  __syncthreads();
  const float scale = bins.scales[job.tensor * bins.scale_stride];
  const int64_t from = (blockIdx.x - job.first_block) * kHistogramPiece;
  const int64_t to = from + kHistogramPiece < job.length ? from + kHistogramPiece : job.length;
  with_dtype(job.dtype, [&](auto load) {
    using L = decltype(load);
    using T = typename L::T;
    const T* x = static_cast<const T*>(job.data);
    const auto add = [&](T value) {
      atomicAdd(&count[column_of(static_cast<float>(L::value(value)), scale, bins)], 1u);
    };
    int64_t done = from;
    if (job.dense && misalignment(x + from) == 0) {
      constexpr int kSize = Vector<T>::kSize;
      const int64_t vectors = (to - from) / kSize;
      for (int64_t v = threadIdx.x; v < vectors; v += kHistogramThreads) {
        const Vector<T> values(x + from + v * kSize);
#pragma unroll
        for (int i = 0; i < kSize; i++) add(values.element[i]);
      }
      done = from + vectors * kSize;
    }
    for (int64_t i = done + threadIdx.x; i < to; i += kHistogramThreads) {
      int64_t a = i, b;
      if (!job.dense) job.inner.offsets(i, &a, &b);
      add(x[a]);
    }
  });
  __syncthreads();
  for (int c = threadIdx.x; c < columns; c += kHistogramThreads) {
    if (count[c]) {
      atomicAdd(bins.counts + job.tensor * static_cast<int64_t>(columns) + c,
                static_cast<unsigned long long>(count[c]));
    }
  }
}

inline HistogramJob plan_histogram(const View& x, int32_t tensor) {
  HistogramJob job{};
  job.data = x.data;
  job.tensor = tensor;
  job.dtype = x.dtype;
  job.dense = describe_inner(x, x, 0, job.inner, job.length);
  job.blocks = (job.length + kHistogramPiece - 1) / kHistogramPiece;
  return job;
}

}  // namespace psap
