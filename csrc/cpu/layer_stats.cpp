// layer_stats: for every filter f (row of dimension 0) of every layer, over its elements i,
//   sum |w|, sum w^2, sum |g|, sum g^2, sum |w g|, sum w g, sum w;  #(|w| < tau), #non-finite w, g
// and the same totals per layer; on request sum w g per input channel. Fused: ten reductions over
// two tensors, all layers in one call. Reads every weight and gradient once (8 bytes an element in
// fp32); writes 36 bytes a filter. Work is cut into units by shape alone, and units are added in
// order: the bits do not depend on the number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <vector>

#include "capability.h"
#include "stats_units.h"
#include "tensor_list.h"

namespace psap {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Runs one unit. `products` is scratch for sums per input channel, null where none are wanted.
using Loop = void (*)(const StatsLayer&, const Unit&, const Outputs&, Totals*, double* products,
                      double* sums);

template <class D, bool kGrads, bool kInputs>
PSAP_INLINE void run(const StatsLayer& layer, const Unit& unit, const Outputs& out, Totals* totals,
                     Number<D>* products) {
  const bool whole = unit.to - unit.from == layer.inner.count();
  Totals unit_total;
  unit_total.clear();
  for (int64_t f = unit.begin; f < unit.end; f++) {
    Totals one;
    add_filter<D, kGrads, kInputs>(layer, f, unit.from, unit.to, one, products);
    if (whole) {
      unit_total.add(one);
      out.filter(layer.first + f, one);
    } else {
      totals[f - unit.begin] = one;
    }
  }
  if (whole) *totals = unit_total;
}

template <class D, bool kGrads>
PSAP_INLINE void run(const StatsLayer& layer, const Unit& unit, const Outputs& out, Totals* totals,
                     double* scratch, double* sums) {
  // Room for doubles holds as many floats; without inputs it is not touched.
  Number<D>* products = reinterpret_cast<Number<D>*>(scratch);
  if constexpr (kGrads) {
    if (unit.channels > 0) {
      std::fill_n(products, unit.to - unit.from + kStep<D>, Number<D>{0});
      run<D, true, true>(layer, unit, out, totals, products);
      std::fill_n(sums, unit.channels, 0.0);
      fold_products<D>(layer, unit.from, unit.to, unit.channel, products, sums);
      return;
    }
  }
  run<D, kGrads, false>(layer, unit, out, totals, products);
}

template <class D, bool kGrads>
void run_portable(const StatsLayer& layer, const Unit& unit, const Outputs& out, Totals* totals,
                  double* scratch, double* sums) {
  run<D, kGrads>(layer, unit, out, totals, scratch, sums);
}

#if PSAP_HAS_AVX2
template <class D, bool kGrads>
PSAP_TARGET_AVX2 void run_avx2(const StatsLayer& layer, const Unit& unit, const Outputs& out,
                               Totals* totals, double* scratch, double* sums) {
  run<D, kGrads>(layer, unit, out, totals, scratch, sums);
}
#endif

template <template <Isa> class D>
Loop choose(bool grads, bool avx2) {
#if PSAP_HAS_AVX2
  if (avx2) return grads ? run_avx2<D<Isa::kAvx2>, true> : run_avx2<D<Isa::kAvx2>, false>;
#endif
  (void)avx2;
  return grads ? run_portable<D<Isa::kPortable>, true> : run_portable<D<Isa::kPortable>, false>;
}

Loop choose(ScalarType dtype, bool grads, bool avx2) {
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

StatsLayer describe(const Tensor& w, const Tensor* g, float tau, int64_t first, bool per_input) {
  STD_TORCH_CHECK(w.is_cpu() && w.dim() >= 1, "layer_stats: weights must be CPU tensors, [O, ...]");
  const auto sizes = w.sizes();
  const auto strides = w.strides();
  const int64_t dims = static_cast<int64_t>(sizes.size());
  StatsLayer layer;
  layer.w = w.const_data_ptr();
  layer.g = nullptr;
  const int64_t* g_strides = strides.data();
  if (g) {
    STD_TORCH_CHECK(g->is_cpu() && g->scalar_type() == w.scalar_type() && g->sizes() == sizes,
                    "layer_stats: a gradient differs from its weight in device, dtype or shape");
    layer.g = g->const_data_ptr();
    g_strides = g->strides().data();
  }
  layer.filters = sizes[0];
  layer.first = first;
  layer.w_stride = strides[0];
  layer.g_stride = g_strides[0];
  layer.inner = PairLayout(sizes.data() + 1, strides.data() + 1, g_strides + 1, dims - 1);
  STD_TORCH_CHECK(layer.inner.count() <= INT32_MAX, "layer_stats: a filter is too long");
  layer.tau = tau;
  if (per_input && dims > 1) {
    layer.inputs = sizes[1];
    for (int64_t d = 2; d < dims; d++) {
      if (strides[d] <= strides[1]) layer.after *= sizes[d];  // the order of PairLayout
    }
  }
  return layer;
}

Outputs layer_stats(const TensorList& weights, const TensorList& grads, const Tensor& tau,
                    bool per_input) {
  const size_t n = weights.size();
  const bool has_grads = grads.size() > 0;
  STD_TORCH_CHECK(!has_grads || grads.size() == n,
                  "layer_stats: as many grads as weights are wanted, or none");
  STD_TORCH_CHECK(has_grads || n == 0 || !per_input, "layer_stats: per_input needs grads");
  STD_TORCH_CHECK(tau.is_cpu() && tau.scalar_type() == ScalarType::Float && tau.dim() == 1 &&
                      tau.size(0) == static_cast<int64_t>(n),
                  "layer_stats: tau must be a float32 CPU tensor [L], one value for each weight");
  const float* limit = tau.const_data_ptr<float>();
  const int64_t tau_stride = tau.stride(0);
  const bool avx2 = use_avx2();

  std::vector<StatsLayer> layers;
  std::vector<Loop> loops;
  Work work;
  layers.reserve(n);
  loops.reserve(n);
  work.units.reserve(n);
  work.start.reserve(n + 1);
  int64_t filters = 0, inputs = 0;
  for (size_t l = 0; l < n; l++) {
    const Tensor w = weights[l];
    const float t = limit[static_cast<int64_t>(l) * tau_stride];
    if (has_grads) {
      const Tensor g = grads[l];
      layers.push_back(describe(w, &g, t, filters, per_input));
    } else {
      layers.push_back(describe(w, nullptr, t, filters, per_input));
    }
    loops.push_back(choose(w.scalar_type(), has_grads, avx2));
    work.add(layers[l], static_cast<int64_t>(l));
    filters += layers[l].filters;
    inputs += layers[l].inputs;
  }

  const Outputs out(tau, static_cast<int64_t>(n), filters, inputs);
  const std::unique_ptr<Totals[]> totals(new Totals[work.totals]);
  const std::unique_ptr<double[]> sums(new double[work.sums]);
  // A unit belongs to the range in which it starts.
  torch::stable::parallel_for(0, work.start.back(), 1 << 15, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<double[]> scratch(new double[work.scratch]);
    size_t u = std::lower_bound(work.start.begin(), work.start.end(), begin) - work.start.begin();
    for (; u < work.units.size() && work.start[u] < end; u++) {
      const Unit& unit = work.units[u];
      loops[unit.layer](layers[unit.layer], unit, out, totals.get() + unit.totals, scratch.get(),
                        sums.get() + unit.sums);
    }
  });
  Combine(work, totals.get(), sums.get(), out).layers(layers);
  return out;
}

void boxed(StableIValue* stack, uint64_t, uint64_t) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  const Outputs out = layer_stats(TensorList(stack[0]), TensorList(stack[1]), to<Tensor>(stack[2]),
                                  to<bool>(stack[3]));
  stack[0] = from(out.filter_sums);
  stack[1] = from(out.filter_counts);
  stack[2] = from(out.layer_sums);
  stack[3] = from(out.layer_counts);
  stack[4] = from(out.input_sums);
}

}  // namespace
}  // namespace psap

STABLE_TORCH_LIBRARY_IMPL(psap, CPU, m) { m.impl("layer_stats", &psap::boxed); }
