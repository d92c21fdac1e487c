// Walks two tensors of one shape together, whatever their strides.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>

namespace psap {

struct Dim {
  int64_t size;
  int64_t a;  // stride in the first tensor, in elements
  int64_t b;  // stride in the second tensor, in elements
};

// The dimensions of one filter, outermost first, with those merged that are laid out as one in
// both tensors. A filter that is dense in both (contiguous or channels_last alike) is one run of
// stride 1; a filter of a single element has no dimension left. Never allocates.
class PairLayout {
 public:
  static constexpr int kMaxDims = 8;  // after merging

  PairLayout() = default;

  // sizes, a, b: shape and strides without dimension 0; `n` of them.
  PairLayout(const int64_t* sizes, const int64_t* a, const int64_t* b, int64_t n) {
    std::array<Dim, kMaxDims> dims;
    int found = 0;
    for (int64_t d = 0; d < n; d++) {
      count_ *= sizes[d];
      if (sizes[d] == 1) continue;
      if (found == kMaxDims)
        throw std::runtime_error("a tensor has too many dimensions: merge some with .flatten()");
      // Memory order of the first tensor; stable, hence a function of the strides alone.
      int at = found++;
      for (; at > 0 && dims[at - 1].a < a[d]; at--) dims[at] = dims[at - 1];
      dims[at] = {sizes[d], a[d], b[d]};
    }
    for (int i = 0; i < found; i++) {
      const Dim& dim = dims[i];
      Dim* outer = n_ ? &dims_[n_ - 1] : nullptr;
      if (outer && outer->a == dim.a * dim.size && outer->b == dim.b * dim.size) {
        *outer = {outer->size * dim.size, dim.a, dim.b};
      } else {
        dims_[n_++] = dim;
      }
    }
  }

  int64_t count() const { return count_; }

  int dims() const { return n_; }
  const Dim& dim(int d) const { return dims_[d]; }

  bool dense() const { return n_ == 0 || (n_ == 1 && dims_[0].a == 1 && dims_[0].b == 1); }

  // Calls run(offset_a, offset_b, dim) for every innermost row; offsets in elements.
  template <class F>
  void for_each_run(const F& run) const {
    for_each_run(0, count_, run);
  }

  // The same for the elements `from` to `to`, counted in this order: the first and the last row
  // may be parts, whose dim.size is what there is of them.
  template <class F>
  void for_each_run(int64_t from, int64_t to, const F& run) const {
    if (from >= to) return;
    if (n_ == 0) return run(int64_t{0}, int64_t{0}, Dim{1, 1, 1});
    const Dim& inner = dims_[n_ - 1];
    std::array<int64_t, kMaxDims> at{};
    int64_t a = 0, b = 0, rest = from / inner.size;
    for (int d = n_ - 2; d >= 0; d--) {
      at[d] = rest % dims_[d].size;
      rest /= dims_[d].size;
      a += at[d] * dims_[d].a;
      b += at[d] * dims_[d].b;
    }
    for (int64_t first = from % inner.size;; first = 0) {
      const int64_t size = std::min(inner.size - first, to - from);
      run(a + first * inner.a, b + first * inner.b, Dim{size, inner.a, inner.b});
      from += size;
      if (from == to) return;
      for (int d = n_ - 2;; d--) {
        const Dim& dim = dims_[d];
        a += dim.a;
        b += dim.b;
        if (++at[d] < dim.size) break;
        a -= dim.a * dim.size;
        b -= dim.b * dim.size;
        at[d] = 0;
      }
    }
  }

 private:
  std::array<Dim, kMaxDims> dims_;
  int n_ = 0;
  int64_t count_ = 1;
};

}  // namespace psap
