#include "abs_histogram.cuh"
#include "host.h"

namespace psap {
namespace {

Tensor abs_histogram(const std::vector<Tensor>& tensors, const Tensor& scales, int64_t first,
                     int64_t shift, int64_t bins) {
  constexpr const char* op = "abs_histogram";
  const int64_t n = static_cast<int64_t>(tensors.size());
  const Call call(scales, op);
  STD_TORCH_CHECK(
      scales.scalar_type() == ScalarType::Float && scales.dim() == 1 && scales.size(0) == n, op,
      ": scales must be float32 [L], one for each tensor");
  STD_TORCH_CHECK(0 <= first && first <= INT32_MAX && 0 <= shift && shift <= 30 && 1 <= bins &&
                      bins <= kMaxColumns - 2,
                  op, ": first, shift or bins is out of range");
  Plan<HistogramJob> plan;
  std::vector<Tensor> copies;  // or the tensors themselves
  for (int64_t t = 0; t < n; t++) {
    call.require(tensors[t], op);
    Tensor x = tensors[t], same = x;
    make_readable(x, same, 0);
    plan_histogram(plan, view(x, dtype_number(x, op)), static_cast<int32_t>(t));
    copies.push_back(x);
  }
  const Tensor counts = empty(scales, {n, bins + 2}, ScalarType::Long);
  int64_t* out = counts.mutable_data_ptr<int64_t>();
  if (n > 0) {
    check_cuda(cudaMemsetAsync(out, 0, n * (bins + 2) * sizeof(int64_t), call.stream()), op);
  }
  if (plan.blocks > 0) {
    const HistogramBins wanted{scales.const_data_ptr<float>(),
                               reinterpret_cast<unsigned long long*>(out),
                               scales.stride(0),
                               static_cast<int32_t>(first),
                               static_cast<int32_t>(shift),
                               static_cast<int32_t>(bins)};
    call.launch(op, plan, 0, [&](const auto& table, unsigned int*) {
      using Table = std::decay_t<decltype(table)>;
      PSAP_LAUNCH((histogram_kernel<Table>), plan.blocks, kHistogramThreads, call.stream(), table,
                  wanted);
    });
  }
  return counts;
}

}  // namespace
}  // namespace psap

STABLE_TORCH_LIBRARY_IMPL(psap, CUDA, m) {
  m.impl("abs_histogram", TORCH_BOX(&psap::abs_histogram));
}
