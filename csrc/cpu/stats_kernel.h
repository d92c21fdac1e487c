// One filter of layer_stats; see layer_stats.cpp for the equation.
#pragma once

#include <cmath>
#include <cstdint>

#include "../core/layout.h"
#include "../core/stats.h"
#include "simd.h"

namespace psap {

// Everything about one layer that the loop over its filters needs.
struct StatsLayer {
  const void* w;
  const void* g;  // null: no gradients
  int64_t filters;
  int64_t first;               // index of its first filter in the outputs
  int64_t w_stride, g_stride;  // of dimension 0, in elements
  PairLayout inner;
  double tau;
};

// Lanes go to double after so many elements: their error does not grow with the filter.
constexpr int64_t kFlushElements = 2048;

template <class Arith>
PSAP_INLINE void flush(const Lanes<Arith>& lanes, FilterTotals& out) {
  for (int s = 0; s < kLayerSums; s++) out.sum[s] += Arith::total(lanes.sum[s]);
  out.count[kBelowTau] += Arith::total(lanes.below_tau);
}

template <class D, bool kGrads>
PSAP_INLINE void add_dense(const typename D::T* w, const typename D::T* g, int64_t n, double limit,
                           FilterTotals& out) {
  using V = typename D::Arith::V;
  constexpr int64_t kLanes = sizeof(V) / sizeof(V{}[0]);
  const V tau = D::Arith::splat(limit);
  const V none{};
  int64_t i = 0;
  while (i < n) {
    Lanes<typename D::Arith> lanes;
    const int64_t end = i + std::min(n - i, kFlushElements) / kLanes * kLanes;
    for (; i < end; i += kLanes) {
      lanes.template add<kGrads>(D::load(w + i), kGrads ? D::load(g + i) : none, tau);
    }
    const int64_t rest = n - i;
    if (0 < rest && rest < kLanes) {
      // Padding with zeros changes no sum; in the count it is taken back.
      typename D::T w_tail[kLanes] = {}, g_tail[kLanes] = {};
      std::memcpy(w_tail, w + i, rest * sizeof *w);
      if (kGrads) std::memcpy(g_tail, g + i, rest * sizeof *g);
      lanes.template add<kGrads>(D::load(w_tail), kGrads ? D::load(g_tail) : none, tau);
      if (0 < tau[0]) out.count[kBelowTau] -= kLanes - rest;
      i = n;
    }
    flush(lanes, out);
  }
}

// Strides that differ between w and g, or leave gaps: collects a block, then as above.
template <class D, bool kGrads>
PSAP_INLINE void add_strided(const typename D::T* w, const typename D::T* g,
                             const PairLayout& layout, double tau, FilterTotals& out) {
  typename D::T w_block[kFlushElements], g_block[kFlushElements];
  int64_t filled = 0;
  layout.for_each_run([&](int64_t a, int64_t b, const Dim& dim) {
    for (int64_t i = 0; i < dim.size; i++) {
      w_block[filled] = w[a + i * dim.a];
      if (kGrads) g_block[filled] = g[b + i * dim.b];
      if (++filled == kFlushElements) {
        add_dense<D, kGrads>(w_block, g_block, filled, tau, out);
        filled = 0;
      }
    }
  });
  add_dense<D, kGrads>(w_block, g_block, filled, tau, out);
}

template <class D>
void count_nonfinite(const typename D::T* w, const typename D::T* g, const PairLayout& layout,
                     FilterTotals& out) {
  layout.for_each_run([&](int64_t a, int64_t b, const Dim& dim) {
    for (int64_t i = 0; i < dim.size; i++) {
      out.count[kNonfiniteWeight] += (w[a + i * dim.a] & D::kExponent) == D::kExponent;
      if (g) out.count[kNonfiniteGrad] += (g[b + i * dim.b] & D::kExponent) == D::kExponent;
    }
  });
}

template <class D, bool kGrads>
PSAP_INLINE void add_filter(const StatsLayer& layer, int64_t filter, FilterTotals& out) {
  using T = typename D::T;
  const T* w = static_cast<const T*>(layer.w) + filter * layer.w_stride;
  const T* g = kGrads ? static_cast<const T*>(layer.g) + filter * layer.g_stride : nullptr;
  out.clear();
  if (layer.inner.dense()) {
    add_dense<D, kGrads>(w, g, layer.inner.count(), layer.tau, out);
  } else {
    add_strided<D, kGrads>(w, g, layer.inner, layer.tau, out);
  }
  // A value that is not finite always leaves its sum so: only then read the filter again.
  if (!std::isfinite(out.sum[kWeightAbs]) || !std::isfinite(out.sum[kGradAbs])) {
    count_nonfinite<D>(w, g, layer.inner, out);
  }
}

}  // namespace psap
