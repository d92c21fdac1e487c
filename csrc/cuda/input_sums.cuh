// layer_stats per input channel, on request: sum of w g over all filters and places of the kernel.
// A second launch, which reads w and g again. A block has 32 channels; its warps share the filters,
// and are added in order.
#pragma once

#include "table.cuh"

namespace psap {

constexpr int kInputThreads = 256;
constexpr int kInputWarps = kInputThreads / kWarp;

struct InputJob {
  const void* w;
  const void* g;
  int64_t filters, inputs, length;  // length: elements of a kernel [kh, kw]
  int64_t w_filter, g_filter, w_input, g_input;
  int64_t first_block, blocks, first_input;
  int32_t dtype, dense;
  Strided inner;
};

template <class Table>
__global__ void __launch_bounds__(kInputThreads, 2)
    input_kernel(PSAP_GRID_CONSTANT const Table table, float* out) {
  PSAP_SHARED(double, part, [kInputWarps][kWarp]);
  const InputJob& job = table.jobs()[find_job(table, blockIdx.x)];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t input = (blockIdx.x - job.first_block) * kWarp + lane;
  double sum = 0;
  if (input < job.inputs) {
    with_dtype(job.dtype, [&](auto load) {
      using L = decltype(load);
      using T = typename L::T;
      for (int64_t f = warp; f < job.filters; f += kInputWarps) {
        const T* w = static_cast<const T*>(job.w) + f * job.w_filter + input * job.w_input;
        const T* g = static_cast<const T*>(job.g) + f * job.g_filter + input * job.g_input;
        for (int64_t k = 0; k < job.length; k++) {
          int64_t a = k, b = k;
          if (!job.dense) job.inner.offsets(k, &a, &b);
          sum += static_cast<double>(L::value(w[a]) * L::value(g[b]));
        }
      }
    });
  }
  part[warp][lane] = sum;
  __syncthreads();
  if (warp == 0 && input < job.inputs) {
    double total = 0;
    for (int w = 0; w < kInputWarps; w++) total += part[w][lane];
    out[job.first_input + input] = static_cast<float>(total);
  }
}

inline InputJob plan_inputs(const View& w, const View& g, int64_t first_input) {
  InputJob job{};
  job.w = w.data;
  job.g = g.data;
  job.filters = w.sizes[0];
  job.inputs = w.sizes[1];
  job.w_filter = w.strides[0];
  job.g_filter = g.strides[0];
  job.w_input = w.strides[1];
  job.g_input = g.strides[1];
  job.first_input = first_input;
  job.dtype = w.dtype;
  job.dense = describe_inner(w, g, 2, job.inner, job.length);
  job.blocks = (job.inputs + kWarp - 1) / kWarp;
  return job;
}

}  // namespace psap
