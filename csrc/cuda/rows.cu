// zero_filters_ and restore_filters_.
#include "host.h"
#include "rows.cuh"

namespace psap {
namespace {

void launch_rows(const Call& call, const Plan<RowJob>& plan, const char* op) {
  if (plan.blocks == 0) return;
  call.launch(op, plan, 0, [&](const auto& table, unsigned int*) {
    using Table = std::decay_t<decltype(table)>;
    PSAP_LAUNCH((row_kernel<Table>), plan.blocks, kRowThreads, call.stream(), table);
  });
}

void zero_filters_(const std::vector<Tensor>& tensors, const std::vector<Tensor>& keep) {
  constexpr const char* op = "zero_filters_";
  STD_TORCH_CHECK(tensors.size() == keep.size(), op, ": as many keep masks as tensors are wanted");
  if (tensors.empty()) return;
  const Call call(tensors[0], op);
  for (size_t t = 0; t < tensors.size(); t++) {
    const Tensor& x = tensors[t];
    const Tensor& mask = keep[t];
    call.require(x, op);
    call.require(mask, op);
    STD_TORCH_CHECK(x.dim() >= 1, op, ": tensors must be [O, ...]");
    require_own_memory(x, op);
    STD_TORCH_CHECK(
        mask.scalar_type() == ScalarType::Bool && mask.dim() == 1 && mask.size(0) == x.size(0), op,
        ": keep must be bool [O], one value for each filter");
  }
  Plan<RowJob> plan;
  for (size_t t = 0; t < tensors.size(); t++) {
    plan_rows(plan, written_bytes_of(tensors[t]), nullptr, keep[t].const_data_ptr(),
              keep[t].stride(0), keep[t].size(0));
  }
  launch_rows(call, plan, op);
}

// A device list cannot be checked without waiting for it: an index out of range traps, and of a row
// that is named twice either copy may stay.
void restore_filters_(const std::vector<Tensor>& tensors, const std::vector<Tensor>& rows,
                      const std::vector<Tensor>& saved) {
  constexpr const char* op = "restore_filters_";
  STD_TORCH_CHECK(tensors.size() == rows.size() && tensors.size() == saved.size(), op,
                  ": as many rows and saved tensors as tensors are wanted");
  if (tensors.empty()) return;
  const Call call(tensors[0], op);
  for (size_t t = 0; t < tensors.size(); t++) {
    const Tensor& x = tensors[t];
    for (const Tensor* each : {&x, &rows[t], &saved[t]}) call.require(*each, op);
    require_own_memory(x, op);
    STD_TORCH_CHECK(rows[t].scalar_type() == ScalarType::Long && rows[t].dim() == 1, op,
                    ": rows must be int64 and of one dimension");
    STD_TORCH_CHECK(same_rows(x, saved[t]) && saved[t].scalar_type() == x.scalar_type() &&
                        saved[t].size(0) == rows[t].size(0),
                    op, ": saved must be [len(rows), ...] like the tensor's rows");
  }
  Plan<RowJob> plan;
  for (size_t t = 0; t < tensors.size(); t++) {
    const View from = bytes_of(saved[t]);
    plan_rows(plan, written_bytes_of(tensors[t]), &from, rows[t].const_data_ptr(),
              rows[t].stride(0), rows[t].size(0));
  }
  launch_rows(call, plan, op);
}

}  // namespace
}  // namespace psap

STABLE_TORCH_LIBRARY_IMPL(psap, CUDA, m) {
  m.impl("zero_filters_", TORCH_BOX(&psap::zero_filters_));
  m.impl("restore_filters_", TORCH_BOX(&psap::restore_filters_));
}
