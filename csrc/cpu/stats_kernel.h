// One filter of layer_stats; see layer_stats.cpp for the equation.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../core/layout.h"
#include "../core/stats.h"
#include "simd.h"

namespace psap {

// Everything about one layer that the loops over its filters need.
struct StatsLayer {
  const void* w;
  const void* g;  // null: no gradients
  int64_t filters;
  int64_t first;               // index of its first filter in the outputs
  int64_t w_stride, g_stride;  // of dimension 0, in elements
  PairLayout inner;
  double tau;
  // For sums per input channel: element p of a filter, in the order of `inner`, belongs to channel
  // p / after % inputs. 0 inputs: not asked for.
  int64_t inputs = 0, after = 1;
};

// Lanes go to double after so many elements: 32 additions in float, whose error stays below 5e-7
// even where all values are equal and every addition is rounded to the same side.
constexpr int64_t kFlushElements = 256;
constexpr int64_t kBlockElements = 2048;  // of strided values that are collected at a time
// How far ahead of the loads memory is asked for: the processor's own prefetching stops at the end
// of a page.
constexpr int64_t kPrefetchBytes = 1024;

template <class D>
using Number = std::remove_reference_t<decltype(typename D::Arith::V{}[0])>;

// Elements of one load.
template <class D>
constexpr int64_t kStep = D::kVectors * D::Arith::kLanes;

// The value of one element, in the arithmetic of its dtype.
template <class D>
PSAP_INLINE Number<D> scalar(typename D::T bits) {
  if constexpr (sizeof(bits) == sizeof(Number<D>)) {
    Number<D> x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  } else {
    typename D::T block[kStep<D>] = {bits};
    typename D::Arith::V v[D::kVectors];
    D::load(block, v);
    return v[0][0];
  }
}

PSAP_INLINE void add_to(double* sums, const f64x4& more) {
  const f64x4 sum = load_unaligned<f64x4>(sums) + more;
  std::memcpy(sums, &sum, sizeof sum);
}

// Running sums in double, and the count below tau, still by lane.
struct Wide {
  f64x4 sum[kLayerSums + 1] = {};

  template <class Arith>
  PSAP_INLINE void add(const Lanes<Arith>& lanes) {
    for (int s = 0; s < kLayerSums; s++) sum[s] += Arith::fold(lanes.sum[s]);
    sum[kLayerSums] += Arith::fold(lanes.below_tau);
  }
  PSAP_INLINE void add_to(Totals& out) const {
    psap::add_to(out.sum, lane_sums(sum[0], sum[1], sum[2], sum[3]));
    psap::add_to(out.sum + 4, lane_sums(sum[4], sum[5], sum[6], sum[7]));
  }
};

// One load of w and g. `products`, if not null, gets w g added for each lane.
template <class D, bool kGrads, bool kInputs>
PSAP_INLINE void add_vectors(Lanes<typename D::Arith>& lanes, const typename D::T* w,
                             const typename D::T* g, const typename D::Arith::V& tau,
                             Number<D>* products) {
  using V = typename D::Arith::V;
  V x[D::kVectors], y[D::kVectors]{};
  D::load(w, x);
  if (kGrads) D::load(g, y);
  for (int v = 0; v < D::kVectors; v++) {
    lanes.template add<kGrads>(x[v], y[v], tau);
    if (kInputs) {
      const V sum = load_unaligned<V>(products + v * D::Arith::kLanes) + x[v] * y[v];
      std::memcpy(products + v * D::Arith::kLanes, &sum, sizeof sum);
    }
  }
}

template <class D, bool kGrads, bool kInputs>
PSAP_INLINE void add_dense(const typename D::T* w, const typename D::T* g, int64_t n, double limit,
                           Wide& sums, Totals& out, Number<D>* products) {
  constexpr int64_t kAhead = kPrefetchBytes / static_cast<int64_t>(sizeof *w);
  const typename D::Arith::V tau = D::Arith::splat(limit);
  int64_t i = 0;
  while (i < n) {
    Lanes<typename D::Arith> lanes;
    const int64_t end = i + std::min(n - i, kFlushElements) / kStep<D> * kStep<D>;
    for (; i + kStep<D> < end; i += 2 * kStep<D>) {
      __builtin_prefetch(w + i + kAhead);
      if (kGrads) __builtin_prefetch(g + i + kAhead);
      for (int64_t j = i; j <= i + kStep<D>; j += kStep<D>) {
        add_vectors<D, kGrads, kInputs>(lanes, w + j, g + j, tau, products + j);
      }
    }
    if (i < end) {
      add_vectors<D, kGrads, kInputs>(lanes, w + i, g + i, tau, products + i);
      i = end;
    }
    const int64_t rest = n - i;
    if (0 < rest && rest < kStep<D>) {
      // Padding with zeros changes no sum; in the count it is taken back.
      typename D::T w_tail[kStep<D>] = {}, g_tail[kStep<D>] = {};
      std::memcpy(w_tail, w + i, rest * sizeof *w);
      if (kGrads) std::memcpy(g_tail, g + i, rest * sizeof *g);
      add_vectors<D, kGrads, kInputs>(lanes, w_tail, g_tail, tau, products + i);
      if (0 < tau[0]) out.sum[kLayerSums] -= static_cast<double>(kStep<D> - rest);
      i = n;
    }
    sums.add(lanes);
  }
}

// Strides that differ between w and g, or leave gaps: collects a block, then as above.
template <class D, bool kGrads, bool kInputs>
PSAP_INLINE void add_strided(const typename D::T* w, const typename D::T* g,
                             const PairLayout& layout, int64_t from, int64_t to, double tau,
                             Wide& sums, Totals& out, Number<D>* products) {
  typename D::T w_block[kBlockElements], g_block[kBlockElements];
  for (int64_t at = from; at < to; at += kBlockElements) {
    const int64_t end = std::min(to, at + kBlockElements);
    int64_t filled = 0;
    layout.for_each_run(at, end, [&](int64_t a, int64_t b, const Dim& dim) {
      for (int64_t i = 0; i < dim.size; i++, filled++) {
        w_block[filled] = w[a + i * dim.a];
        if (kGrads) g_block[filled] = g[b + i * dim.b];
      }
    });
    add_dense<D, kGrads, kInputs>(w_block, g_block, filled, tau, sums, out, products + (at - from));
  }
}

template <class D>
void count_nonfinite(const typename D::T* w, const typename D::T* g, const PairLayout& layout,
                     int64_t from, int64_t to, Totals& out) {
  layout.for_each_run(from, to, [&](int64_t a, int64_t b, const Dim& dim) {
    for (int64_t i = 0; i < dim.size; i++) {
      out.nonfinite[0] += (w[a + i * dim.a] & D::kExponent) == D::kExponent;
      if (g) out.nonfinite[1] += (g[b + i * dim.b] & D::kExponent) == D::kExponent;
    }
  });
}

// Elements `from` to `to` of a filter, in the order of its layout. With kInputs, w g of each is
// added to `products`, in the lanes' order.
template <class D, bool kGrads, bool kInputs>
PSAP_INLINE void add_filter(const StatsLayer& layer, int64_t filter, int64_t from, int64_t to,
                            Totals& out, Number<D>* products) {
  using T = typename D::T;
  const T* w = static_cast<const T*>(layer.w) + filter * layer.w_stride;
  const T* g = kGrads ? static_cast<const T*>(layer.g) + filter * layer.g_stride : w;
  out.clear();
  Wide sums;
  if (layer.inner.dense()) {
    add_dense<D, kGrads, kInputs>(w + from, g + from, to - from, layer.tau, sums, out, products);
  } else {
    add_strided<D, kGrads, kInputs>(w, g, layer.inner, from, to, layer.tau, sums, out, products);
  }
  sums.add_to(out);
  // A value that is not finite always leaves its sum so: only then read the filter again.
  if (!std::isfinite(out.sum[kWeightAbs]) || !std::isfinite(out.sum[kGradAbs])) {
    count_nonfinite<D>(w, kGrads ? g : nullptr, layer.inner, from, to, out);
  }
}

// Folds the products of elements `from` to `to` into their channels; sums[0] is that of `from`
// unless the elements go round all channels, when it is that of channel 0.
template <class D>
PSAP_INLINE void fold_products(const StatsLayer& layer, int64_t from, int64_t to, int64_t channel,
                               const Number<D>* products, double* sums) {
  int64_t c = from / layer.after % layer.inputs;
  int64_t left = layer.after - from % layer.after;
  for (int64_t p = 0; p < to - from; c = c + 1 == layer.inputs ? 0 : c + 1) {
    const int64_t end = std::min(to - from, p + left);
    double sum = 0;
    for (; p < end; p++) sum += products[p / kStep<D> * kStep<D> + D::slot(p % kStep<D>)];
    sums[c - channel] += sum;
    left = layer.after;
  }
}

}  // namespace psap
