// The rows (dimension 0) of a tensor, for kernels that move bytes and do not look at values.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstring>

#include "../core/layout.h"

namespace psap {

// Copies elements of a size known when compiled: a memcpy of 1 to 16 bytes is one or two moves.
// Falls back to a plain memcpy for other sizes.
template <class F>
void with_fixed_size(int64_t bytes, const F& body) {
  switch (bytes) {
#define PSAP_CASE(N) \
  case N:            \
    return body([](void* to, const void* from) { std::memcpy(to, from, N); });
    PSAP_CASE(1)
    PSAP_CASE(2)
    PSAP_CASE(4)
    PSAP_CASE(8)
    PSAP_CASE(16)
    PSAP_CASE(18)
    PSAP_CASE(36)
    PSAP_CASE(72)
#undef PSAP_CASE
    default:
      return body([bytes](void* to, const void* from) { std::memcpy(to, from, bytes); });
  }
}

// Where the rows of two tensors with equal rows lie; strides in elements.
struct RowPair {
  char* to;
  const char* from;
  int64_t to_stride, from_stride;
  int64_t element;  // bytes
  PairLayout inner;

  void copy(int64_t to_row, int64_t from_row) const {
    if (inner.count() == 0) return;
    char* t = to + to_row * to_stride * element;
    const char* f = from + from_row * from_stride * element;
    if (inner.dense()) {
      std::memcpy(t, f, inner.count() * element);
      return;
    }
    with_fixed_size(element, [&](auto copy_one) {
      inner.for_each_run([&](int64_t a, int64_t b, const Dim& dim) {
        for (int64_t i = 0; i < dim.size; i++) {
          copy_one(t + (a + i * dim.a) * element, f + (b + i * dim.b) * element);
        }
      });
    });
  }
};

// All bits zero is the zero of every dtype.
struct Rows {
  char* data;
  int64_t stride;
  int64_t element;
  PairLayout inner;

  void zero(int64_t row) const {
    if (inner.count() == 0) return;
    char* to = data + row * stride * element;
    if (inner.dense()) {
      std::memset(to, 0, inner.count() * element);
      return;
    }
    inner.for_each_run([&](int64_t a, int64_t, const Dim& dim) {
      for (int64_t i = 0; i < dim.size; i++)
        std::memset(to + (a + i * dim.a) * element, 0, element);
    });
  }
};

// Sizes and strides without dimension 0, of two tensors that share them.
inline PairLayout inner_layout(const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  return PairLayout(a.sizes().data() + 1, a.strides().data() + 1, b.strides().data() + 1,
                    a.dim() - 1);
}

}  // namespace psap
