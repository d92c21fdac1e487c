// layer_stats: for every filter f (row of dimension 0) of every layer, over its elements i,
//   sum |w|, sum w^2, sum |g|, sum g^2, sum |w g|, sum w g, sum w;  #(|w| < tau), #non-finite w, g
// and the same totals per layer. Fused: ten reductions over two tensors, all layers in one call.
// Reads every weight and gradient once (8 bytes an element in fp32); writes 36 bytes a filter.
// A filter is summed by one thread in one order: the bits do not depend on the number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <tuple>
#include <vector>

#include "capability.h"
#include "stats_kernel.h"

namespace psap {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A range of filters of one layer; `out` is the layer's own part of the totals.
using FilterLoop = void (*)(const StatsLayer&, int64_t begin, int64_t end, FilterTotals* out);

template <class D, bool kGrads>
void filters_default(const StatsLayer& layer, int64_t begin, int64_t end, FilterTotals* out) {
  for (int64_t f = begin; f < end; f++) add_filter<D, kGrads>(layer, f, out[f]);
}

#if PSAP_HAS_AVX2
template <class D, bool kGrads>
PSAP_TARGET_AVX2 void filters_avx2(const StatsLayer& layer, int64_t begin, int64_t end,
                                   FilterTotals* out) {
  for (int64_t f = begin; f < end; f++) add_filter<D, kGrads>(layer, f, out[f]);
}
#endif

template <class D>
FilterLoop choose(bool grads, bool avx2) {
#if PSAP_HAS_AVX2
  if (avx2) return grads ? filters_avx2<D, true> : filters_avx2<D, false>;
#endif
  (void)avx2;
  return grads ? filters_default<D, true> : filters_default<D, false>;
}

FilterLoop choose(ScalarType dtype, bool grads, bool avx2) {
  switch (dtype) {
    case ScalarType::Float:
      return choose<Float32>(grads, avx2);
    case ScalarType::Double:
      return choose<Float64>(grads, avx2);
    case ScalarType::BFloat16:
      return choose<BFloat16>(grads, avx2);
    case ScalarType::Half:
      return choose<Float16>(grads, avx2);
    default:
      STD_TORCH_CHECK(false, "layer_stats: weights must be float32, float64, bfloat16 or float16");
  }
}

void check_pair(const Tensor& w, const Tensor& g) {
  STD_TORCH_CHECK(g.is_cpu(), "layer_stats: a gradient is not on the CPU as the weights are");
  STD_TORCH_CHECK(g.scalar_type() == w.scalar_type(),
                  "layer_stats: a gradient has another dtype than its weight");
  bool same = g.dim() == w.dim();
  for (int64_t d = 0; same && d < w.dim(); d++) same = g.size(d) == w.size(d);
  STD_TORCH_CHECK(same, "layer_stats: a gradient has another shape than its weight");
}

StatsLayer describe(const Tensor& w, const Tensor* g, float tau, int64_t first) {
  STD_TORCH_CHECK(w.is_cpu() && w.dim() >= 1, "layer_stats: weights must be CPU tensors, [O, ...]");
  if (g) check_pair(w, *g);
  const int64_t* w_strides = w.strides().data();
  const int64_t* g_strides = g ? g->strides().data() : w_strides;
  return {w.const_data_ptr(),
          g ? g->const_data_ptr() : nullptr,
          w.size(0),
          first,
          w_strides[0],
          g_strides[0],
          PairLayout(w.sizes().data() + 1, w_strides + 1, g_strides + 1, w.dim() - 1),
          tau};
}

// The outputs, and the plain pointers into them.
struct Outputs {
  Tensor filter_sums, filter_counts, layer_sums, layer_counts;

  Outputs(const Tensor& like, int64_t layers, int64_t filters)
      : filter_sums(torch::stable::new_empty(like, {kFilterSums, filters}, ScalarType::Float)),
        filter_counts(torch::stable::new_empty(like, {kCounts, filters}, ScalarType::Int)),
        layer_sums(torch::stable::new_empty(like, {layers, kLayerSums}, ScalarType::Double)),
        layer_counts(torch::stable::new_empty(like, {layers, kCounts}, ScalarType::Long)) {}

  void write(const std::vector<StatsLayer>& layers, const FilterTotals* totals,
             int64_t filters) const {
    float* fs = filter_sums.mutable_data_ptr<float>();
    int32_t* fc = filter_counts.mutable_data_ptr<int32_t>();
    double* ls = layer_sums.mutable_data_ptr<double>();
    int64_t* lc = layer_counts.mutable_data_ptr<int64_t>();
    for (const StatsLayer& layer : layers) {
      FilterTotals sum;
      sum.clear();
      for (int64_t f = layer.first; f < layer.first + layer.filters; f++) {
        for (int s = 0; s < kLayerSums; s++) sum.sum[s] += totals[f].sum[s];
        for (int c = 0; c < kCounts; c++) sum.count[c] += totals[f].count[c];
        for (int s = 0; s < kFilterSums; s++) {
          fs[s * filters + f] = static_cast<float>(totals[f].sum[s]);
        }
        for (int c = 0; c < kCounts; c++) {
          fc[c * filters + f] = static_cast<int32_t>(totals[f].count[c]);
        }
      }
      for (int s = 0; s < kLayerSums; s++) *ls++ = sum.sum[s];
      for (int c = 0; c < kCounts; c++) *lc++ = sum.count[c];
    }
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_stats(const std::vector<Tensor>& weights,
                                                       const std::vector<Tensor>& grads,
                                                       const Tensor& tau) {
  const int64_t n = static_cast<int64_t>(weights.size());
  const bool has_grads = !grads.empty();
  STD_TORCH_CHECK(!has_grads || grads.size() == weights.size(),
                  "layer_stats: as many grads as weights are wanted, or none");
  STD_TORCH_CHECK(tau.is_cpu() && tau.dim() == 1 && tau.size(0) == n,
                  "layer_stats: tau must be a CPU tensor [L], one value for each weight");
  const float* limit = tau.const_data_ptr<float>();
  const bool avx2 = use_avx2();

  std::vector<StatsLayer> layers;
  std::vector<FilterLoop> loops;
  std::vector<int64_t> start{0};  // in units of work: elements, at least one a filter
  int64_t filters = 0;
  for (int64_t l = 0; l < n; l++) {
    const Tensor& w = weights[l];
    layers.push_back(
        describe(w, has_grads ? &grads[l] : nullptr, limit[l * tau.stride(0)], filters));
    loops.push_back(choose(w.scalar_type(), has_grads, avx2));
    filters += layers[l].filters;
    start.push_back(start[l] + layers[l].filters * std::max<int64_t>(1, layers[l].inner.count()));
  }

  const Outputs out(tau, n, filters);
  const std::unique_ptr<FilterTotals[]> totals(new FilterTotals[filters]);
  // A filter belongs to the range in which it starts.
  torch::stable::parallel_for(0, start[n], 1 << 15, [&](int64_t begin, int64_t end) {
    int64_t l = std::upper_bound(start.begin(), start.end(), begin) - start.begin() - 1;
    for (; l < n && start[l] < end; l++) {
      const int64_t work = std::max<int64_t>(1, layers[l].inner.count());
      const int64_t from = (std::max(begin - start[l], int64_t{0}) + work - 1) / work;
      const int64_t to = (std::min(end, start[l + 1]) - start[l] + work - 1) / work;
      loops[l](layers[l], from, to, totals.get() + layers[l].first);
    }
  });
  out.write(layers, totals.get(), filters);
  return {out.filter_sums, out.filter_counts, out.layer_sums, out.layer_counts};
}

}  // namespace
}  // namespace psap

STABLE_TORCH_LIBRARY_IMPL(psap, CPU, m) { m.impl("layer_stats", TORCH_BOX(&psap::layer_stats)); }
