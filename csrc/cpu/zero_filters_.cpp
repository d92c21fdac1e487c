// zero_filters_: tensors[t][o] = 0 where keep[t][o] is false; other rows are not touched.
// Fused: all tensors in one call, and no read of the rows (NaN and Inf are cleared too, which
// multiplying by a mask cannot do). Reads one byte a row; writes the bytes of the cleared rows.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "rows.h"

namespace psap {
namespace {

using torch::stable::Tensor;

void zero_filters_(const std::vector<Tensor>& tensors, const std::vector<Tensor>& keep) {
  STD_TORCH_CHECK(tensors.size() == keep.size(),
                  "zero_filters_: as many keep masks as tensors are wanted");
  std::vector<Rows> rows;
  std::vector<std::pair<size_t, int64_t>> cleared;  // (tensor, row)
  int64_t elements = 0;
  for (size_t t = 0; t < tensors.size(); t++) {
    const Tensor& x = tensors[t];
    const Tensor& mask = keep[t];
    STD_TORCH_CHECK(x.is_cpu() && x.dim() >= 1,
                    "zero_filters_: tensors must be on the CPU, [O, ...]");
    STD_TORCH_CHECK(mask.is_cpu() && mask.dim() == 1 && mask.size(0) == x.size(0),
                    "zero_filters_: keep must be a CPU tensor [O], one value for each filter");
    const bool* kept = mask.const_data_ptr<bool>();
    const int64_t step = mask.stride(0);
    rows.push_back({static_cast<char*>(x.mutable_data_ptr()), x.stride(0),
                    static_cast<int64_t>(x.element_size()), inner_layout(x, x)});
    for (int64_t o = 0; o < x.size(0); o++) {
      if (kept[o * step]) continue;
      cleared.push_back({t, o});
      elements += rows[t].inner.count();
    }
  }
  const int64_t n = static_cast<int64_t>(cleared.size());
  // A thread gets no less than about 32 Ki elements.
  const int64_t grain = std::max<int64_t>(1, (n << 15) / std::max<int64_t>(1, elements));
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) rows[cleared[i].first].zero(cleared[i].second);
  });
}

}  // namespace
}  // namespace psap

STABLE_TORCH_LIBRARY_IMPL(psap, CPU, m) {
  m.impl("zero_filters_", TORCH_BOX(&psap::zero_filters_));
}
