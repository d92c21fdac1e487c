// The part of layer_stats that is done on request: the sum of w g over all filters and places of
// the kernel, for every input channel. Blocks of the same launch, which read w and g once more. A
// block has 32 channels, a lane each; its warps share the filters, and are added in order.
#pragma once

#include "stats_plan.cuh"

namespace psap {

template <class L>
__device__ __forceinline__ double sum_input(const StatsJob& job, const Strided& layout,
                                            int64_t input, int warp, int warps) {
  using T = typename L::T;
  const T* w = static_cast<const T*>(job.w) + input * layout.a[0] + warp * job.w_stride;
  const T* g = static_cast<const T*>(job.g) + input * layout.b[0] + warp * job.g_stride;
  const bool dense =
      job.length == 1 || (layout.size[3] == job.length && layout.a[3] == 1 && layout.b[3] == 1);
  double sum = 0;
  for (int f = warp; f < job.filters; f += warps) {
#pragma unroll 4
    for (int k = 0; k < job.length; k++) {
      int64_t a = k, b = k;
      if (!dense) layout.offsets(k, &a, &b);
      sum += static_cast<double>(L::value(__ldg(w + a)) * L::value(__ldg(g + b)));
    }
    w += warps * job.w_stride;
    g += warps * job.g_stride;
  }
  return sum;
}

__device__ __forceinline__ void sum_inputs(const StatsJob& job, const Strided& layout,
                                           int64_t block, float* out) {
  constexpr int kWarps = kStatsThreads / kWarp;
  PSAP_SHARED(double, part, [kWarps][kWarp]);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t input = block * kWarp + lane;
  const bool there = input < job.inputs;
  double sum = 0;
  if (there && job.length > 0) {
    with_dtype(job.dtype, [&](auto load) {
      sum = sum_input<decltype(load)>(job, layout, input, warp, kWarps);
    });
  }
  part[warp][lane] = sum;
  __syncthreads();
  if (warp == 0 && there) {
    double total = 0;
    for (int w = 0; w < kWarps; w++) total += part[w][lane];
    out[job.first_output + input] = static_cast<float>(total);
  }
}

}  // namespace psap
