// restore_filters_: tensors[t][rows[t][r]] = saved[t][r], bit for bit; other rows are not touched.
// Fused: all tensors in one call. Reads the saved rows and 8 bytes an index; writes the same rows.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "rows.h"

namespace psap {
namespace {

using torch::stable::Tensor;

struct RowCopy {
  size_t tensor;
  int64_t to, from;
};

RowPair describe(const Tensor& x, const Tensor& rows, const Tensor& saved) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() >= 1,
                  "restore_filters_: tensors must be on the CPU, [O, ...]");
  STD_TORCH_CHECK(rows.is_cpu() && rows.dim() == 1,
                  "restore_filters_: rows must be a CPU tensor of one dimension");
  bool same = saved.is_cpu() && saved.scalar_type() == x.scalar_type() && saved.dim() == x.dim() &&
              saved.size(0) == rows.size(0);
  for (int64_t d = 1; same && d < x.dim(); d++) same = saved.size(d) == x.size(d);
  STD_TORCH_CHECK(same, "restore_filters_: saved must be [len(rows), ...] like the tensor's rows");
  return {static_cast<char*>(x.mutable_data_ptr()),
          static_cast<const char*>(saved.const_data_ptr()),
          x.stride(0),
          saved.stride(0),
          static_cast<int64_t>(x.element_size()),
          inner_layout(x, saved)};
}

void restore_filters_(const std::vector<Tensor>& tensors, const std::vector<Tensor>& rows,
                      const std::vector<Tensor>& saved) {
  STD_TORCH_CHECK(tensors.size() == rows.size() && tensors.size() == saved.size(),
                  "restore_filters_: as many rows and saved tensors as tensors are wanted");
  std::vector<RowPair> pairs;
  std::vector<RowCopy> copies;
  int64_t elements = 0;
  for (size_t t = 0; t < tensors.size(); t++) {
    pairs.push_back(describe(tensors[t], rows[t], saved[t]));
    const int64_t* index = rows[t].const_data_ptr<int64_t>();
    const int64_t step = rows[t].stride(0);
    for (int64_t r = 0; r < rows[t].size(0); r++) {
      const int64_t row = index[r * step];
      STD_TORCH_CHECK(0 <= row && row < tensors[t].size(0), "restore_filters_: row ", row,
                      " of tensor ", t, " is out of range [0, ", tensors[t].size(0), ")");
      copies.push_back({t, row, r});
      elements += pairs[t].inner.count();
    }
  }
  const int64_t n = static_cast<int64_t>(copies.size());
  const int64_t grain = std::max<int64_t>(1, (n << 15) / std::max<int64_t>(1, elements));
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      pairs[copies[i].tensor].copy(copies[i].to, copies[i].from);
    }
  });
}

}  // namespace
}  // namespace psap

STABLE_TORCH_LIBRARY_IMPL(psap, CPU, m) {
  m.impl("restore_filters_", TORCH_BOX(&psap::restore_filters_));
}
