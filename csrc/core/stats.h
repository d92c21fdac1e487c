// The arithmetic of layer_stats, once for every backend: what one step adds, and what is kept.
#pragma once

#include <cstdint>

#include "macros.h"

namespace psap {

// Order of the per-filter sums. The first six are the rows of filter_sums; all seven are the
// columns of layer_sums.
enum Sum {
  kWeightAbs,
  kWeightSq,
  kGradAbs,
  kGradSq,
  kWeightGradAbs,
  kWeightGrad,
  kWeight,
  kLayerSums,
  kFilterSums = kWeight,
};

// Order of the counts: rows of filter_counts, columns of layer_counts.
enum Count { kBelowTau, kNonfiniteWeight, kNonfiniteGrad, kCounts };

// One set of running sums. A gives the number type V (a scalar or a SIMD vector), the integer type
// I of the same width, absolute(V) -> V and below(V, V) -> I (1 where x < limit, else 0). Multiply
// and add stay two roundings (the build forbids contraction), so that every CPU gives the same
// bits.
template <class A>
struct Lanes {
  typename A::V sum[kLayerSums];
  typename A::I below_tau;

  // Member by member: zeroing the whole as one block keeps it in memory instead of registers.
  PSAP_HD PSAP_INLINE Lanes() {
    for (int s = 0; s < kLayerSums; s++) sum[s] = typename A::V{};
    below_tau = typename A::I{};
  }

  template <bool kGrads>
  PSAP_HD PSAP_INLINE void add(const typename A::V& w, const typename A::V& g,
                               const typename A::V& tau) {
    const typename A::V w_abs = A::absolute(w);
    sum[kWeight] += w;
    sum[kWeightAbs] += w_abs;
    sum[kWeightSq] += w * w;
    below_tau += A::below(w_abs, tau);
    if (kGrads) {
      const typename A::V wg = w * g;
      sum[kGradAbs] += A::absolute(g);
      sum[kGradSq] += g * g;
      sum[kWeightGrad] += wg;
      sum[kWeightGradAbs] += A::absolute(wg);
    }
  }
};

// What is known of a filter, or of several, when they have been read.
struct Totals {
  double sum[kLayerSums + 1];  // the last one: the count below tau, exact up to 2^53
  int64_t nonfinite[2];        // among the weights, among the gradients

  PSAP_HD PSAP_INLINE void clear() {
    for (double& s : sum) s = 0;
    nonfinite[0] = nonfinite[1] = 0;
  }
  PSAP_HD PSAP_INLINE void add(const Totals& other) {
    for (int s = 0; s <= kLayerSums; s++) sum[s] += other.sum[s];
    for (int n = 0; n < 2; n++) nonfinite[n] += other.nonfinite[n];
  }
  PSAP_HD PSAP_INLINE int64_t count(int c) const {
    return c == kBelowTau ? static_cast<int64_t>(sum[kLayerSums]) : nonfinite[c - 1];
  }
};

}  // namespace psap
