// zero_filters_ and restore_filters_.
#include "host.h"
#include "rows.cuh"

namespace psap {
namespace {

void launch_rows(const Call& call, std::vector<RowJob>& jobs, const char* op) {
  const int64_t blocks = number_blocks(jobs);
  if (blocks == 0) return;
  call.with(jobs, [&](const auto& table) {
    using Table = std::decay_t<decltype(table)>;
    PSAP_LAUNCH((row_kernel<Table>), blocks, kRowThreads, call.stream(), table);
  });
  Call::launched(op);
}

void zero_filters_(const std::vector<Tensor>& tensors, const std::vector<Tensor>& keep) {
  constexpr const char* op = "zero_filters_";
  STD_TORCH_CHECK(tensors.size() == keep.size(), op, ": as many keep masks as tensors are wanted");
  if (tensors.empty()) return;
  const Call call(tensors[0]);
  std::vector<RowJob> jobs;
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
    jobs.push_back(
        plan_rows(bytes_of(x), nullptr, mask.const_data_ptr(), mask.stride(0), mask.size(0)));
  }
  launch_rows(call, jobs, op);
}

// A device list cannot be checked without waiting for it: an index out of range traps, and of a row
// that is named twice either copy may stay.
void restore_filters_(const std::vector<Tensor>& tensors, const std::vector<Tensor>& rows,
                      const std::vector<Tensor>& saved) {
  constexpr const char* op = "restore_filters_";
  STD_TORCH_CHECK(tensors.size() == rows.size() && tensors.size() == saved.size(), op,
                  ": as many rows and saved tensors as tensors are wanted");
  if (tensors.empty()) return;
  const Call call(tensors[0]);
  std::vector<RowJob> jobs;
  for (size_t t = 0; t < tensors.size(); t++) {
    const Tensor& x = tensors[t];
    for (const Tensor* each : {&x, &rows[t], &saved[t]}) call.require(*each, op);
    require_own_memory(x, op);
    STD_TORCH_CHECK(rows[t].scalar_type() == ScalarType::Long && rows[t].dim() == 1, op,
                    ": rows must be int64 and of one dimension");
    STD_TORCH_CHECK(same_rows(x, saved[t]) && saved[t].scalar_type() == x.scalar_type() &&
                        saved[t].size(0) == rows[t].size(0),
                    op, ": saved must be [len(rows), ...] like the tensor's rows");
    const View from = bytes_of(saved[t]);
    jobs.push_back(plan_rows(bytes_of(x), &from, rows[t].const_data_ptr(), rows[t].stride(0),
                             rows[t].size(0)));
  }
  launch_rows(call, jobs, op);
}

}  // namespace
}  // namespace psap

STABLE_TORCH_LIBRARY_IMPL(psap, CUDA, m) {
  m.impl("zero_filters_", TORCH_BOX(&psap::zero_filters_));
  m.impl("restore_filters_", TORCH_BOX(&psap::restore_filters_));
}
