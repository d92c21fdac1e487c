#include "gate_stats_.cuh"
#include "host.h"

namespace psap {
namespace {

void gate_stats_(const Tensor& sums, const Tensor& seen, const std::vector<Tensor>& values,
                 const std::vector<Tensor>& grads, const Tensor& terms, const Tensor& offsets,
                 double scale) {
  constexpr const char* op = "gate_stats_";
  const Call call(sums, op);
  for (const Tensor* each : {&sums, &seen, &terms, &offsets}) {
    call.require(*each, op);
    STD_TORCH_CHECK(each->is_contiguous(), op,
                    ": sums, seen, terms and offsets must be contiguous");
  }
  STD_TORCH_CHECK(
      offsets.scalar_type() == ScalarType::Int && offsets.dim() == 1 && offsets.size(0) >= 1, op,
      ": offsets must be int32 [C + 1]");
  const int64_t channels = offsets.size(0) - 1;
  STD_TORCH_CHECK(sums.scalar_type() == ScalarType::Double && sums.dim() == 2 &&
                      sums.size(0) == 2 && sums.size(1) == channels,
                  op, ": sums must be float64 [2, C]");
  STD_TORCH_CHECK(seen.scalar_type() == ScalarType::Long && seen.dim() == 1 && seen.size(0) == 2,
                  op, ": seen must be int64 [2]");
  STD_TORCH_CHECK(terms.scalar_type() == ScalarType::Int && terms.dim() == 2 && terms.size(1) == 3,
                  op, ": terms must be int32 [T, 3]");
  STD_TORCH_CHECK(values.size() == grads.size(), op, ": as many grads as values are wanted");
  Plan<GateJob> plan;
  std::vector<Tensor> copies;  // or the tensors themselves
  for (size_t k = 0; k < values.size(); k++) {
    call.require(values[k], op);
    call.require(grads[k], op);
    STD_TORCH_CHECK(
        same_rows(values[k], grads[k]) && values[k].scalar_type() == grads[k].scalar_type(), op,
        ": rows of a value and its gradient differ in dtype or shape");
    Tensor v = values[k], g = grads[k];
    make_readable(v, g, 1);
    const int32_t dtype = dtype_number(v, op);
    plan_gate(plan, view(v, dtype), view(g, dtype));
    copies.insert(copies.end(), {v, g});
  }
  STD_TORCH_CHECK(terms.size(0) <= INT32_MAX && (channels || terms.size(0) == 0), op,
                  ": terms that offsets do not name");
  const int32_t lane_bits = gate_lane_bits(plan, channels, terms.size(0));
  const Tensor before = empty(sums, {2, channels}, ScalarType::Double);
  GateOutput out{sums.mutable_data_ptr<double>(),
                 reinterpret_cast<long long*>(seen.mutable_data_ptr<int64_t>()),
                 terms.const_data_ptr<int32_t>(),
                 offsets.const_data_ptr<int32_t>(),
                 before.mutable_data_ptr<double>(),
                 nullptr,
                 channels,
                 terms.size(0),
                 scale,
                 lane_bits};
  call.launch(op, plan, 2, [&](const auto& table, unsigned int* ticket) {
    using Table = std::decay_t<decltype(table)>;
    out.ticket = ticket;
    PSAP_LAUNCH((gate_kernel<Table>), gate_blocks(channels, lane_bits), kGateThreads, call.stream(),
                table, out);
  });
}

}  // namespace
}  // namespace psap

STABLE_TORCH_LIBRARY_IMPL(psap, CUDA, m) { m.impl("gate_stats_", TORCH_BOX(&psap::gate_stats_)); }
