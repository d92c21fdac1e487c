#include "../core/memory_format.h"
#include "host.h"
#include "shrink.cuh"

namespace psap {
namespace {

KeepList keep_list(const Call& call, const Tensor& keep) {
  constexpr const char* op = "shrink";
  call.require(keep, op);
  STD_TORCH_CHECK(keep.dim() == 1 && keep.scalar_type() == ScalarType::Long, op,
                  ": index lists must be int64 and of one dimension");
  return {keep.const_data_ptr<int64_t>(), keep.size(0), keep.stride(0)};
}

// A device list cannot be checked without waiting for it: an index out of range traps.
std::vector<Tensor> shrink(const std::vector<Tensor>& tensors, const std::vector<Tensor>& keep_dim0,
                           const std::vector<Tensor>& keep_dim1) {
  constexpr const char* op = "shrink";
  STD_TORCH_CHECK(tensors.size() == keep_dim0.size() && tensors.size() == keep_dim1.size(), op,
                  ": one keep_dim0 and one keep_dim1 for each tensor are wanted");
  std::vector<Tensor> outputs;
  if (tensors.empty()) return outputs;
  const Call call(tensors[0], op);
  Plan<ShrinkJob> plan;
  for (size_t t = 0; t < tensors.size(); t++) {
    Tensor x = tensors[t];
    call.require(x, op);
    STD_TORCH_CHECK(x.dim() >= 1, op, ": tensors must be [O, ...]");
    const KeepList first = keep_list(call, keep_dim0[t]);
    const KeepList second = x.dim() > 1 ? keep_list(call, keep_dim1[t]) : KeepList{nullptr, 1, 1};
    const OutputShape shape(x, first.count, second.count);
    outputs.push_back(shape.empty(x, x.get_device()));
    plan_shrink(plan, bytes_of(x), written_bytes_of(outputs.back()), first,
                x.dim() > 1 ? &second : nullptr);
  }
  if (plan.blocks > 0) {
    call.launch(op, plan, 0, [&](const auto& table, unsigned int*) {
      using Table = std::decay_t<decltype(table)>;
      PSAP_LAUNCH((shrink_kernel<Table>), plan.blocks, kShrinkThreads, call.stream(), table);
    });
  }
  return outputs;
}

}  // namespace
}  // namespace psap

STABLE_TORCH_LIBRARY_IMPL(psap, CUDA, m) { m.impl("shrink", TORCH_BOX(&psap::shrink)); }
