// Walks two tensors of one shape together, whatever their strides.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace psap {

struct Dim {
  int64_t size;
  int64_t a;  // stride in the first tensor, in elements
  int64_t b;  // stride in the second tensor, in elements
};

// The dimensions of one filter, outermost first, with those merged that are laid out as one in
// both tensors. A filter that is dense in both (contiguous or channels_last alike) is one run of
// stride 1; a filter of a single element has no dimension left.
class PairLayout {
 public:
  // sizes, a, b: shape and strides without dimension 0; `n` of them.
  PairLayout(const int64_t* sizes, const int64_t* a, const int64_t* b, int64_t n) {
    std::vector<Dim> dims;
    for (int64_t d = 0; d < n; d++) {
      count_ *= sizes[d];
      if (sizes[d] != 1) dims.push_back({sizes[d], a[d], b[d]});
    }
    // Memory order of the first tensor; stable, hence a function of the strides alone.
    std::stable_sort(dims.begin(), dims.end(),
                     [](const Dim& x, const Dim& y) { return x.a > y.a; });
    for (const Dim& dim : dims) {
      Dim* outer = dims_.empty() ? nullptr : &dims_.back();
      if (outer && outer->a == dim.a * dim.size && outer->b == dim.b * dim.size) {
        *outer = {outer->size * dim.size, dim.a, dim.b};
      } else {
        dims_.push_back(dim);
      }
    }
  }

  int64_t count() const { return count_; }

  bool dense() const {
    return dims_.empty() || (dims_.size() == 1 && dims_[0].a == 1 && dims_[0].b == 1);
  }

  // Calls run(offset_a, offset_b, dim) for every innermost row; offsets in elements.
  template <class F>
  void for_each_run(const F& run) const {
    if (count_ == 0) return;
    if (dims_.empty()) return run(int64_t{0}, int64_t{0}, Dim{1, 1, 1});
    const size_t outer = dims_.size() - 1;
    std::vector<int64_t> at(outer, 0);
    int64_t a = 0, b = 0;
    for (;;) {
      run(a, b, dims_[outer]);
      size_t d = outer;
      for (; d > 0; d--) {
        const Dim& dim = dims_[d - 1];
        a += dim.a;
        b += dim.b;
        if (++at[d - 1] < dim.size) break;
        a -= dim.a * dim.size;
        b -= dim.b * dim.size;
        at[d - 1] = 0;
      }
      if (d == 0) return;
    }
  }

 private:
  std::vector<Dim> dims_;
  int64_t count_ = 1;
};

}  // namespace psap
