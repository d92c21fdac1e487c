// Walks the elements of one or two tensors of one shape: for layer_stats and abs_histogram.
// Dense runs are read 16 bytes at a time, each byte once; other layouts element by element.
#pragma once

#include "device.cuh"

namespace psap {

// How a dense run is read: `head` elements one by one, `packs` times 16 bytes, and the rest one by
// one again. Where two tensors are misaligned differently, packs is 0.
struct Runs {
  int head, packs;

  template <class T>
  __device__ __forceinline__ Runs(const T* w, const T* g, int n) : head(0), packs(0) {
    const int first = static_cast<int>((16 - misalignment(w)) % 16 / sizeof(T));
    if (misalignment(w) != misalignment(g) || first > n) return;
    head = first;
    packs = (n - head) / Vector<T>::kSize;
  }
};

// Calls add(w, g) for those of the elements first ... first + n - 1 that belong to thread `me` of
// `threads`: always the same ones, in the same order. `layout` is null where they are dense.
template <class L, bool kPairs, class Add>
__device__ __forceinline__ void for_each_element(const typename L::T* w, const typename L::T* g,
                                                 const Strided* layout, int64_t first, int n,
                                                 int me, int threads, const Add& add) {
  using T = typename L::T;
  constexpr int kSize = Vector<T>::kSize;
  if (layout) {
#pragma unroll 1
    for (int i = me; i < n; i += threads) {
      int64_t a, b;
      layout->offsets(static_cast<uint32_t>(first) + i, &a, &b);
      add(__ldg(w + a), kPairs ? __ldg(g + b) : T{});
    }
    return;
  }
  w += first;
  g = kPairs ? g + first : w;
  const auto add_one = [&](int i) { add(__ldg(w + i), kPairs ? __ldg(g + i) : T{}); };
  const auto add_pack = [&](const uint4& first_pack, const uint4& second_pack) {
    const Vector<T> x(first_pack), y(second_pack);
#pragma unroll
    for (int k = 0; k < kSize; k++) add(x.element[k], y.element[k]);
  };
  const Runs runs(w, g, n);
  for (int i = me; i < runs.head; i += threads) add_one(i);
  const T* x = w + runs.head;
  const T* y = g + runs.head;
  int p = me;
  // Two packs of each tensor under way: 64 bytes a thread.
  for (; p + threads < runs.packs; p += 2 * threads) {
    const uint4 x0 = load128(x + p * kSize), x1 = load128(x + (p + threads) * kSize);
    const uint4 y0 = kPairs ? load128(y + p * kSize) : x0;
    const uint4 y1 = kPairs ? load128(y + (p + threads) * kSize) : x1;
    add_pack(x0, y0);
    add_pack(x1, y1);
  }
  if (p < runs.packs) {
    const uint4 x0 = load128(x + p * kSize);
    add_pack(x0, kPairs ? load128(y + p * kSize) : x0);
  }
  for (int i = runs.head + runs.packs * kSize + me; i < n; i += threads) add_one(i);
}

}  // namespace psap
