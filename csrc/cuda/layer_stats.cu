#include <tuple>

#include "host.h"
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
  const Call call(tau, op);
  STD_TORCH_CHECK(tau.scalar_type() == ScalarType::Float && tau.dim() == 1 && tau.size(0) == n, op,
                  ": tau must be float32 [L], one value for each weight");
  StatsPlan work;
  std::vector<Tensor> ws, gs;  // they hold copies until the launch
  for (int64_t l = 0; l < n; l++) {
    Tensor w = weights[l];
    call.require(w, op);
    STD_TORCH_CHECK(w.dim() >= 1, op, ": weights must be [O, ...]");
    Tensor g = grads.empty() ? w : grads[l];
    call.require(g, op);
    STD_TORCH_CHECK(same_rows(w, g) && w.size(0) == g.size(0) && w.scalar_type() == g.scalar_type(),
                    op, ": a gradient differs from its weight in dtype or shape");
    make_readable(w, g, 1);
    if (per_input) make_readable(w, g, 2, 3);
    const int32_t dtype = dtype_number(w, op);
    const View view_g = view(g, dtype);
    work.add(view(w, dtype), grads.empty() ? nullptr : &view_g);
    ws.push_back(w);
    gs.push_back(g);
  }
  for (int64_t l = 0; per_input && l < n; l++) {
    const int32_t dtype = dtype_number(ws[l], op);
    if (ws[l].dim() > 1) work.add_inputs(view(ws[l], dtype), view(gs[l], dtype));
  }
  const Tensor filter_sums = empty(tau, {kFilterSums, work.filters}, ScalarType::Float);
  const Tensor filter_counts = empty(tau, {kCounts, work.filters}, ScalarType::Int);
  const Tensor layer_sums = empty(tau, {n, kLayerSums}, ScalarType::Double);
  const Tensor layer_counts = empty(tau, {n, kCounts}, ScalarType::Long);
  const Tensor input_sums = empty(tau, {work.inputs}, ScalarType::Float);
  const Tensor partial = empty(tau, {work.partials(), kTotals}, ScalarType::Double);
  if (n > 0) {
    StatsOutput out{tau.const_data_ptr<float>(),
                    filter_sums.mutable_data_ptr<float>(),
                    filter_counts.mutable_data_ptr<int32_t>(),
                    layer_sums.mutable_data_ptr<double>(),
                    layer_counts.mutable_data_ptr<int64_t>(),
                    input_sums.mutable_data_ptr<float>(),
                    partial.mutable_data_ptr<double>(),
                    nullptr,
                    work.filters,
                    tau.stride(0),
                    work.layers,
                    work.blocks};
    call.launch(op, work.plan, work.tickets(), [&](const auto& table, unsigned int* tickets) {
      out.ticket = tickets;
      launch_stats(!grads.empty(), per_input, table, out, work.plan.blocks, call.stream());
    });
  }
  return {filter_sums, filter_counts, layer_sums, layer_counts, input_sums};
}

}  // namespace
}  // namespace psap

STABLE_TORCH_LIBRARY_IMPL(psap, CUDA, m) { m.impl("layer_stats", TORCH_BOX(&psap::layer_stats)); }
