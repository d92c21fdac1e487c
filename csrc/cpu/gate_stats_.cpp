// gate_stats_: d[c] = scale * sum over the terms (k, i, j) of channel c of <values[k][i],
// grads[k][j]>; if all d are finite, sums[0] += d, sums[1] += d^2, seen[0] += 1; else seen[1] += 1.
// Fused: all channels of a network in one call. Reads the rows that terms name, once, and 12 bytes
// a term; writes 16 bytes a channel. All arithmetic is in double, in the order of the terms.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <memory>
#include <vector>

#include "capability.h"
#include "rows.h"
#include "stats_kernel.h"
#include "tensor_list.h"

namespace psap {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Two tensors whose rows are multiplied.
struct Pair {
  const char* value;
  const char* grad;
  int64_t value_step, grad_step;  // bytes from row to row
  int64_t values, grads;          // rows
  double (*dot)(const Pair&, const char* value, const char* grad);
  PairLayout row;
};

// A row of one element, as affine pairs have.
template <class D>
double dot_one(const Pair&, const char* value, const char* grad) {
  using T = typename D::T;
  return static_cast<double>(scalar<D>(*reinterpret_cast<const T*>(value))) *
         static_cast<double>(scalar<D>(*reinterpret_cast<const T*>(grad)));
}

// Any strides. Four running sums, so that additions do not wait for each other.
template <class D>
double dot_strided(const Pair& pair, const char* value, const char* grad) {
  using T = typename D::T;
  const T* v = reinterpret_cast<const T*>(value);
  const T* g = reinterpret_cast<const T*>(grad);
  double sum[4] = {0, 0, 0, 0};
  int64_t at = 0;
  pair.row.for_each_run([&](int64_t a, int64_t b, const Dim& dim) {
    for (int64_t i = 0; i < dim.size; i++) {
      sum[at++ & 3] += static_cast<double>(scalar<D>(v[a + i * dim.a])) *
                       static_cast<double>(scalar<D>(g[b + i * dim.b]));
    }
  });
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

template <Isa isa>
PSAP_INLINE void to_double(const f32x8& x, f64x4* d) {
  d[0] = Convert<isa>::widen(__builtin_shufflevector(x, x, 0, 1, 2, 3));
  d[1] = Convert<isa>::widen(__builtin_shufflevector(x, x, 4, 5, 6, 7));
}

template <Isa isa>
PSAP_INLINE void to_double(const f64x4& x, f64x4* d) {
  d[0] = x;
}

// A row that is dense in both, in vectors; the same bits with AVX2 as without.
template <Isa isa, class D>
PSAP_INLINE double dot_dense(const Pair& pair, const char* value, const char* grad) {
  using T = typename D::T;
  constexpr int kVectors = D::kVectors, kParts = D::Arith::kLanes / 4;
  const T* v = reinterpret_cast<const T*>(value);
  const T* g = reinterpret_cast<const T*>(grad);
  const int64_t n = pair.row.count();
  f64x4 sum[kVectors * kParts] = {};
  int64_t i = 0;
  for (; i + 4 * kVectors * kParts <= n; i += 4 * kVectors * kParts) {
    typename D::Arith::V a[kVectors], b[kVectors];
    D::load(v + i, a);
    D::load(g + i, b);
    for (int k = 0; k < kVectors; k++) {
      f64x4 x[kParts], y[kParts];
      to_double<isa>(a[k], x);
      to_double<isa>(b[k], y);
      for (int p = 0; p < kParts; p++) sum[k * kParts + p] += x[p] * y[p];
    }
  }
  double rest = 0;
  for (; i < n; i++) {
    rest += static_cast<double>(scalar<D>(v[i])) * static_cast<double>(scalar<D>(g[i]));
  }
  f64x4 total = sum[0];
  for (int k = 1; k < kVectors * kParts; k++) total += sum[k];
  return ((total[0] + total[1]) + (total[2] + total[3])) + rest;
}

template <template <Isa> class D>
double dot_default(const Pair& pair, const char* value, const char* grad) {
  return dot_dense<Isa::kPortable, D<Isa::kPortable>>(pair, value, grad);
}

#if PSAP_HAS_AVX2
template <template <Isa> class D>
PSAP_TARGET_AVX2 double dot_avx2(const Pair& pair, const char* value, const char* grad) {
  return dot_dense<Isa::kAvx2, D<Isa::kAvx2>>(pair, value, grad);
}
#endif

template <template <Isa> class D>
auto choose(const PairLayout& row, bool avx2) {
  if (row.dims() == 0) return dot_one<D<Isa::kPortable>>;
  if (!row.dense()) return dot_strided<D<Isa::kPortable>>;
#if PSAP_HAS_AVX2
  if (avx2) return dot_avx2<D>;
#endif
  (void)avx2;
  return dot_default<D>;
}

auto choose(ScalarType dtype, const PairLayout& row, bool avx2) {
  switch (dtype) {
    case ScalarType::Float:
      return choose<Float32>(row, avx2);
    case ScalarType::Double:
      return choose<Float64>(row, avx2);
    case ScalarType::BFloat16:
      return choose<BFloat16>(row, avx2);
    case ScalarType::Half:
      return choose<Float16>(row, avx2);
    default:
      STD_TORCH_CHECK(false, "gate_stats_: values must be float32, float64, bfloat16 or float16");
  }
}

Pair describe(const Tensor& v, const Tensor& g, bool avx2) {
  const ScalarType dtype = v.scalar_type();
  STD_TORCH_CHECK(
      v.is_cpu() && g.is_cpu() && v.dim() >= 1 && v.dim() == g.dim() && g.scalar_type() == dtype,
      "gate_stats_: values and grads must be CPU tensors [O, ...] of one dtype");
  for (int64_t d = 1; d < v.dim(); d++) {
    STD_TORCH_CHECK(v.size(d) == g.size(d), "gate_stats_: rows of a value and a gradient differ");
  }
  const int64_t element = static_cast<int64_t>(v.element_size());
  const PairLayout row = inner_layout(v, g);
  return {static_cast<const char*>(v.const_data_ptr()),
          static_cast<const char*>(g.const_data_ptr()),
          v.stride(0) * element,
          g.stride(0) * element,
          v.size(0),
          g.size(0),
          choose(dtype, row, avx2),
          row};
}

// Returns the number of elements that will be multiplied.
int64_t check_terms(const std::vector<Pair>& pairs, const int32_t* terms, int64_t count,
                    const int32_t* offsets, int64_t channels) {
  int64_t elements = 0;
  bool right = offsets[0] == 0 && offsets[channels] == count;
  for (int64_t c = 0; c < channels; c++) right = right && offsets[c] <= offsets[c + 1];
  for (int64_t t = 0; t < count && right; t++) {
    const int32_t* term = terms + 3 * t;
    right = 0 <= term[0] && term[0] < static_cast<int64_t>(pairs.size());
    right = right && 0 <= term[1] && term[1] < pairs[term[0]].values;
    right = right && 0 <= term[2] && term[2] < pairs[term[0]].grads;
    if (right) elements += pairs[term[0]].row.count();
  }
  STD_TORCH_CHECK(right, "gate_stats_: terms or offsets are out of range");
  return elements;
}

void check_outputs(const Tensor& sums, const Tensor& seen, const Tensor& terms,
                   const Tensor& offsets) {
  const auto fits = [](const Tensor& x, ScalarType dtype) {
    return x.is_cpu() && x.is_contiguous() && x.scalar_type() == dtype;
  };
  STD_TORCH_CHECK(fits(offsets, ScalarType::Int) && offsets.dim() == 1 && offsets.size(0) >= 1,
                  "gate_stats_: offsets must be int32 [C + 1], contiguous, on the CPU");
  STD_TORCH_CHECK(fits(sums, ScalarType::Double) && sums.dim() == 2 && sums.size(0) == 2 &&
                      sums.size(1) == offsets.size(0) - 1,
                  "gate_stats_: sums must be float64 [2, C], contiguous, on the CPU");
  STD_TORCH_CHECK(fits(seen, ScalarType::Long) && seen.dim() == 1 && seen.size(0) == 2,
                  "gate_stats_: seen must be int64 [2], contiguous, on the CPU");
  STD_TORCH_CHECK(fits(terms, ScalarType::Int) && terms.dim() == 2 && terms.size(1) == 3,
                  "gate_stats_: terms must be int32 [T, 3], contiguous, on the CPU");
}

void gate_stats_(const Tensor& sums, const Tensor& seen, const TensorList& values,
                 const TensorList& grads, const Tensor& terms, const Tensor& offsets,
                 double scale) {
  check_outputs(sums, seen, terms, offsets);
  STD_TORCH_CHECK(values.size() == grads.size(), "gate_stats_: as many grads as values are wanted");
  std::vector<Pair> pairs;
  pairs.reserve(values.size());
  const bool avx2 = use_avx2();
  for (size_t k = 0; k < values.size(); k++) pairs.push_back(describe(values[k], grads[k], avx2));
  const int32_t* term = terms.const_data_ptr<int32_t>();
  const int32_t* offset = offsets.const_data_ptr<int32_t>();
  const int64_t channels = sums.size(1);
  const int64_t elements = check_terms(pairs, term, terms.size(0), offset, channels);

  // A thread gets no less than about 32 Ki elements or 2,048 channels.
  const int64_t grain = std::min<int64_t>(
      2048, std::max<int64_t>(1, (channels << 15) / std::max<int64_t>(1, elements)));
  const std::unique_ptr<double[]> d(new double[channels]);
  torch::stable::parallel_for(0, channels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c++) {
      double sum = 0;
      for (int64_t t = offset[c]; t < offset[c + 1]; t++) {
        const Pair& pair = pairs[term[3 * t]];
        sum += pair.dot(pair, pair.value + term[3 * t + 1] * pair.value_step,
                        pair.grad + term[3 * t + 2] * pair.grad_step);
      }
      d[c] = sum * scale;
    }
  });
  bool finite = true;
  for (int64_t c = 0; c < channels; c++) finite = finite && std::isfinite(d[c]);
  seen.mutable_data_ptr<int64_t>()[finite ? 0 : 1]++;
  if (!finite) return;
  double* s = sums.mutable_data_ptr<double>();
  for (int64_t c = 0; c < channels; c++) {
    s[c] += d[c];
    s[channels + c] += d[c] * d[c];
  }
}

void boxed(StableIValue* stack, uint64_t, uint64_t) {
  using torch::stable::detail::to;
  gate_stats_(to<Tensor>(stack[0]), to<Tensor>(stack[1]), TensorList(stack[2]),
              TensorList(stack[3]), to<Tensor>(stack[4]), to<Tensor>(stack[5]),
              to<double>(stack[6]));
}

}  // namespace
}  // namespace psap

STABLE_TORCH_LIBRARY_IMPL(psap, CPU, m) { m.impl("gate_stats_", &psap::boxed); }
