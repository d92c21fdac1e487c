#include <tuple>

#include "host.h"
#include "input_sums.cuh"
#include "layer_stats.cuh"

namespace psap {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> layer_stats(const std::vector<Tensor>& weights,
                                                               const std::vector<Tensor>& grads,
                                                               const Tensor& tau, bool per_input) {
  constexpr const char* op = "layer_stats";
  const int64_t n = static_cast<int64_t>(weights.size());
  STD_TORCH_CHECK(grads.empty() || grads.size() == weights.size(), op,
                  ": as many grads as weights are wanted, or none");
  STD_TORCH_CHECK(!grads.empty() || n == 0 || !per_input, op, ": per_input needs grads");
  const Call call(tau);
  call.require(tau, op);
  STD_TORCH_CHECK(tau.scalar_type() == ScalarType::Float && tau.dim() == 1 && tau.size(0) == n, op,
                  ": tau must be float32 [L], one value for each weight");
  std::vector<StatsJob> jobs;
  std::vector<InputJob> input_jobs;
  int64_t filters = 0, inputs = 0;
  for (int64_t l = 0; l < n; l++) {
    const Tensor& w = weights[l];
    call.require(w, op);
    STD_TORCH_CHECK(w.dim() >= 1, op, ": weights must be [O, ...]");
    const View view_w = view(w, dtype_number(w, op));
    View view_g = view_w;
    if (!grads.empty()) {
      const Tensor& g = grads[l];
      call.require(g, op);
      STD_TORCH_CHECK(
          same_rows(w, g) && w.size(0) == g.size(0) && w.scalar_type() == g.scalar_type(), op,
          ": a gradient differs from its weight in dtype or shape");
      view_g = view(g, view_w.dtype);
    }
    jobs.push_back(plan_stats(view_w, grads.empty() ? nullptr : &view_g, l, filters));
    if (per_input && w.dim() > 1) {
      input_jobs.push_back(plan_inputs(view_w, view_g, inputs));
      inputs += w.size(1);
    }
    filters += w.size(0);
  }
  const int64_t blocks = number_blocks(jobs);
  const int64_t input_blocks = number_blocks(input_jobs);
  const Tensor filter_sums = empty(tau, {kFilterSums, filters}, ScalarType::Float);
  const Tensor filter_counts = empty(tau, {kCounts, filters}, ScalarType::Int);
  const Tensor layer_sums = empty(tau, {n, kLayerSums}, ScalarType::Double);
  const Tensor layer_counts = empty(tau, {n, kCounts}, ScalarType::Long);
  const Tensor input_sums = empty(tau, {inputs}, ScalarType::Float);
  const Tensor partial = empty(tau, {blocks, kTotals}, ScalarType::Double);
  if (blocks) {
    const StatsOutput out{tau.const_data_ptr<float>(),
                          filter_sums.mutable_data_ptr<float>(),
                          filter_counts.mutable_data_ptr<int32_t>(),
                          layer_sums.mutable_data_ptr<double>(),
                          layer_counts.mutable_data_ptr<int64_t>(),
                          partial.mutable_data_ptr<double>(),
                          call.counters(n),
                          filters,
                          tau.stride(0)};
    call.with(jobs, [&](const auto& table) {
      using Table = std::decay_t<decltype(table)>;
      if (grads.empty()) {
        PSAP_LAUNCH((stats_kernel<Table, false>), blocks, kStatsThreads, call.stream(), table, out);
      } else {
        PSAP_LAUNCH((stats_kernel<Table, true>), blocks, kStatsThreads, call.stream(), table, out);
      }
    });
    Call::launched(op);
  }
  if (input_blocks) {
    float* out = input_sums.mutable_data_ptr<float>();
    call.with(input_jobs, [&](const auto& table) {
      using Table = std::decay_t<decltype(table)>;
      PSAP_LAUNCH((input_kernel<Table>), input_blocks, kInputThreads, call.stream(), table, out);
    });
    Call::launched(op);
  }
  return {filter_sums, filter_counts, layer_sums, layer_counts, input_sums};
}

}  // namespace
}  // namespace psap

STABLE_TORCH_LIBRARY_IMPL(psap, CUDA, m) { m.impl("layer_stats", TORCH_BOX(&psap::layer_stats)); }
