// restore_filters_: tensors[t][rows[t][r]] = saved[t][r], bit for bit; other rows are not touched.
// Fused: all tensors in one call. Reads the saved rows and 8 bytes an index; writes the same rows.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <list>
#include <vector>

#include "rows.h"
#include "tensor_list.h"

namespace psap {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Copies {
  char* to;
  const char* from;
  int64_t to_stride, from_stride, element, bytes;  // bytes: from row to row, an element, a row
  const int64_t* index;
  int64_t step;
  const PairLayout* inner;  // null where a row is dense in both
};

void restore_rows(const Copies& x, int64_t begin, int64_t end) {
  const bool blocks = x.to_stride == x.bytes && x.from_stride == x.bytes;
  for (int64_t r = begin; r < end; r++) {
    const int64_t first = r, row = x.index[r * x.step];
    char* to = x.to + row * x.to_stride;
    const char* from = x.from + first * x.from_stride;
    if (x.inner) {
      copy_row(*x.inner, x.element, to, from);
      continue;
    }
    if (blocks) {
      while (r + 1 < end && x.index[(r + 1) * x.step] == row + (r + 1 - first)) r++;
    }
    std::memcpy(to, from, (r + 1 - first) * x.bytes);
  }
}

// As a plain number: scalar_type() does not know every dtype, and none matters here.
int32_t dtype_of(const Tensor& x) {
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return dtype;
}

void check(const Tensor& x, const Tensor& rows, const Tensor& saved) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() >= 1,
                  "restore_filters_: tensors must be on the CPU, [O, ...]");
  require_own_memory(x, "restore_filters_");
  STD_TORCH_CHECK(rows.is_cpu() && rows.dim() == 1 && rows.scalar_type() == ScalarType::Long,
                  "restore_filters_: rows must be an int64 CPU tensor of one dimension");
  bool same = saved.is_cpu() && dtype_of(saved) == dtype_of(x) && saved.dim() == x.dim() &&
              saved.size(0) == rows.size(0);
  const auto sizes = x.sizes();
  for (size_t d = 1; same && d < sizes.size(); d++) same = saved.size(d) == sizes[d];
  STD_TORCH_CHECK(same, "restore_filters_: saved must be [len(rows), ...] like the tensor's rows");
}

// Every row is there, and named once: otherwise the result would depend on the threads.
void check_rows(const Copies& x, int64_t count, int64_t size, size_t tensor) {
  bool ascending = true;
  int64_t before = -1;
  for (int64_t r = 0; r < count; r++) {
    const int64_t row = x.index[r * x.step];
    STD_TORCH_CHECK(0 <= row && row < size, "restore_filters_: row ", row, " of tensor ", tensor,
                    " is out of range [0, ", size, ")");
    ascending = ascending && before < row;
    before = row;
  }
  if (ascending) return;
  std::vector<bool> named(size, false);
  for (int64_t r = 0; r < count; r++) {
    STD_TORCH_CHECK(!named[x.index[r * x.step]], "restore_filters_: rows of tensor ", tensor,
                    " name a row twice");
    named[x.index[r * x.step]] = true;
  }
}

void restore_filters_(const TensorList& tensors, const TensorList& rows, const TensorList& saved) {
  STD_TORCH_CHECK(tensors.size() == rows.size() && tensors.size() == saved.size(),
                  "restore_filters_: as many rows and saved tensors as tensors are wanted");
  RowRange<Copies> copies(tensors.size());
  std::list<std::vector<int64_t>> indices;  // a list: what it holds must not move
  bool writes_indices = false;
  for (size_t t = 0; t < tensors.size(); t++) {
    writes_indices = writes_indices || dtype_of(tensors[t]) == aoti_torch_dtype_int64();
  }
  std::vector<PairLayout> layouts;
  layouts.reserve(tensors.size());  // the parts point into it
  for (size_t t = 0; t < tensors.size(); t++) {
    const Tensor x = tensors[t];
    const Tensor index = rows[t];
    const Tensor values = saved[t];
    check(x, index, values);
    const int64_t element = static_cast<int64_t>(x.element_size());
    const PairLayout inner = inner_layout(x, values);
    if (!inner.dense()) layouts.push_back(inner);
    const int64_t bytes = inner.count() * element;
    const int64_t* row = static_cast<const int64_t*>(index.const_data_ptr());
    int64_t step = index.stride(0);
    if (writes_indices) {  // one of the tensors may be a list of rows: checked, then changed
      indices.emplace_back(index.size(0));
      for (int64_t r = 0; r < index.size(0); r++) indices.back()[r] = row[r * step];
      row = indices.back().data();
      step = 1;
    }
    const Copies part{static_cast<char*>(x.mutable_data_ptr()),
                      static_cast<const char*>(values.const_data_ptr()),
                      x.stride(0) * element,
                      values.stride(0) * element,
                      element,
                      bytes,
                      row,
                      step,
                      inner.dense() ? nullptr : &layouts.back()};
    check_rows(part, index.size(0), x.size(0), t);
    copies.add(part, index.size(0), bytes);
  }
  copies.for_each(restore_rows);
}

void boxed(StableIValue* stack, uint64_t, uint64_t) {
  restore_filters_(TensorList(stack[0]), TensorList(stack[1]), TensorList(stack[2]));
}

}  // namespace
}  // namespace psap

STABLE_TORCH_LIBRARY_IMPL(psap, CPU, m) { m.impl("restore_filters_", &psap::boxed); }
