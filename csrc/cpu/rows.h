// The rows (dimension 0) of a tensor, for kernels that move bytes and do not look at values.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../core/checks.h"
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

// Copies the elements of one row (strides in elements) to and from any layout.
inline void copy_row(const PairLayout& inner, int64_t element, char* to, const char* from) {
  with_fixed_size(element, [&](auto copy_one) {
    inner.for_each_run([&](int64_t a, int64_t b, const Dim& dim) {
      for (int64_t i = 0; i < dim.size; i++) {
        copy_one(to + (a + i * dim.a) * element, from + (b + i * dim.b) * element);
      }
    });
  });
}

// Sizes and strides without dimension 0, of two tensors that share them.
inline PairLayout inner_layout(const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  return PairLayout(a.sizes().data() + 1, a.strides().data() + 1, b.strides().data() + 1,
                    a.dim() - 1);
}

// The rows of many tensors as one range, cut into parts for threads. `Part` has `rows` and
// `bytes` (of one row); parts are visited in order.
template <class Part>
class RowRange {
 public:
  explicit RowRange(size_t parts) {
    parts_.reserve(parts);
    start_.reserve(parts + 1);
    start_.push_back(0);
  }

  void add(const Part& part, int64_t rows, int64_t row_bytes) {
    if (rows == 0 || row_bytes == 0) return;
    parts_.push_back(part);
    start_.push_back(start_.back() + rows);
    bytes_ += rows * row_bytes;
  }

  int64_t bytes() const { return bytes_; }

  // Calls run(part, first row, row behind the last); a thread gets no less than about 128 KiB.
  template <class F>
  void for_each(const F& run) const {
    const int64_t rows = start_.back();
    if (rows == 0) return;
    const int64_t grain = std::max<int64_t>(1, (rows << 17) / bytes_);
    torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      size_t p = std::upper_bound(start_.begin(), start_.end(), begin) - start_.begin() - 1;
      for (; p < parts_.size() && start_[p] < end; p++) {
        run(parts_[p], std::max(begin, start_[p]) - start_[p],
            std::min(end, start_[p + 1]) - start_[p]);
      }
    });
  }

 private:
  std::vector<Part> parts_;
  std::vector<int64_t> start_;
  int64_t bytes_ = 0;
};

}  // namespace psap
