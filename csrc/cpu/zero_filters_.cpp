// zero_filters_: tensors[t][o] = 0 where keep[t][o] is false; other rows are not touched.
// Fused: all tensors in one call, and no read of the rows (NaN and Inf are cleared too, which
// multiplying by a mask cannot do). Reads one byte a row; writes the bytes of the cleared rows.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "rows.h"
#include "tensor_list.h"

namespace psap {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Masked {
  char* data;
  int64_t stride, element, bytes;  // bytes: from row to row, of an element, of a row
  const bool* keep;
  int64_t step;
  const PairLayout* inner;  // null where a row is dense
};

// All bits zero is the zero of every dtype.
void zero_row(const Masked& x, char* row) {
  x.inner->for_each_run([&](int64_t a, int64_t, const Dim& dim) {
    for (int64_t i = 0; i < dim.size; i++) {
      std::memset(row + (a + i * dim.a) * x.element, 0, x.element);
    }
  });
}

void zero_rows(const Masked& x, int64_t begin, int64_t end) {
  for (int64_t o = begin; o < end; o++) {
    if (x.keep[o * x.step]) continue;
    const int64_t first = o;
    if (x.inner) {
      zero_row(x, x.data + o * x.stride);
      continue;
    }
    if (x.stride == x.bytes) {
      while (o + 1 < end && !x.keep[(o + 1) * x.step]) o++;  // neighbours as one block
    }
    std::memset(x.data + first * x.stride, 0, (o + 1 - first) * x.bytes);
  }
}

void check(const Tensor& x, const Tensor& keep) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() >= 1,
                  "zero_filters_: tensors must be on the CPU, [O, ...]");
  require_own_memory(x, "zero_filters_");
  STD_TORCH_CHECK(keep.is_cpu() && keep.dim() == 1 && keep.size(0) == x.size(0) &&
                      keep.scalar_type() == ScalarType::Bool,
                  "zero_filters_: keep must be a bool CPU tensor [O], a value for each filter");
}

void zero_filters_(const TensorList& tensors, const TensorList& keep) {
  STD_TORCH_CHECK(tensors.size() == keep.size(),
                  "zero_filters_: as many keep masks as tensors are wanted");
  RowRange<Masked> rows(tensors.size());
  std::vector<PairLayout> layouts;
  layouts.reserve(tensors.size());  // the parts point into it
  for (size_t t = 0; t < tensors.size(); t++) {
    const Tensor x = tensors[t];
    const Tensor mask = keep[t];
    check(x, mask);
    const int64_t element = static_cast<int64_t>(x.element_size());
    const PairLayout inner = inner_layout(x, x);
    if (!inner.dense()) layouts.push_back(inner);
    const int64_t bytes = inner.count() * element;
    rows.add({static_cast<char*>(x.mutable_data_ptr()), x.stride(0) * element, element, bytes,
              static_cast<const bool*>(mask.const_data_ptr()), mask.stride(0),
              inner.dense() ? nullptr : &layouts.back()},
             x.size(0), bytes);
  }
  rows.for_each(zero_rows);
}

void boxed(StableIValue* stack, uint64_t, uint64_t) {
  zero_filters_(TensorList(stack[0]), TensorList(stack[1]));
}

}  // namespace
}  // namespace psap

STABLE_TORCH_LIBRARY_IMPL(psap, CPU, m) { m.impl("zero_filters_", &psap::boxed); }
