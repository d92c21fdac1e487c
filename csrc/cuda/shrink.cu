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
  const Call call(tensors[0]);
  std::vector<ShrinkJob> jobs;
  for (size_t t = 0; t < tensors.size(); t++) {
    Tensor x = tensors[t];
    call.require(x, op);
    STD_TORCH_CHECK(x.dim() >= 1, op, ": tensors must be [O, ...]");
    const KeepList first = keep_list(call, keep_dim0[t]);
    const KeepList second = x.dim() > 1 ? keep_list(call, keep_dim1[t]) : KeepList{nullptr, 1, 1};
    const OutputShape shape(x, first.count, second.count);
    outputs.push_back(shape.empty(x, x.get_device()));
    plan_shrink(jobs, bytes_of(x), bytes_of(outputs.back()), first,
                x.dim() > 1 ? &second : nullptr);
  }
  const int64_t blocks = number_blocks(jobs);
  if (blocks) {
    call.with(jobs, [&](const auto& table) {
      using Table = std::decay_t<decltype(table)>;
      PSAP_LAUNCH((shrink_kernel<Table>), blocks, kShrinkThreads, call.stream(), table);
    });
    Call::launched(op);
  }
  return outputs;
}

}  // namespace
}  // namespace psap

STABLE_TORCH_LIBRARY_IMPL(psap, CUDA, m) { m.impl("shrink", TORCH_BOX(&psap::shrink)); }
