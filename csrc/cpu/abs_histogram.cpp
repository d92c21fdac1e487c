// abs_histogram: key = bits of float32(|x|) * scale (one float32 product), a number that grows with
// the value; counts of keys below `first`, in each bin of 2^shift keys, and beyond them.
// Fused: all tensors in one call, no tensor of magnitudes in between. Reads every element once; a
// count is an integer, so that neither threads nor their order matter.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <mutex>
#include <vector>

#include "../core/layout.h"
#include "capability.h"
#include "simd.h"

namespace psap {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxBins = 2048;
constexpr int64_t kPieceElements = 1 << 16;
constexpr int64_t kBlock = 256;
constexpr int64_t kSmall = 4096;  // elements that are not worth tables of their own

struct Bins {
  int32_t first;
  int shift;
  int32_t bins;
};

// What one thread has counted of one tensor. Four tables: elements that lie together often fall
// into one bin, and would wait for each other.
struct Local {
  uint32_t count[4][kMaxBins + 2];
};

struct Float32Keys {
  using T = float;
  static PSAP_INLINE void load(const T* p, f32x8& v) { v = load_unaligned<f32x8>(p); }
};
struct BFloat16Keys {
  using T = uint16_t;
  static PSAP_INLINE void load(const T* p, f32x8& v) {
    v = (f32x8)(__builtin_convertvector(load_unaligned<u16x8>(p), u32x8) << 16);
  }
};
template <Isa isa>
struct Float16Keys {
  using T = uint16_t;
  static PSAP_INLINE void load(const T* p, f32x8& v) { Float16<isa>::load(p, &v); }
};
struct Float64Keys {
  using T = double;
  static PSAP_INLINE void load(const T* p, f32x8& v) {
    for (int i = 0; i < 8; i++) v[i] = static_cast<float>(p[i]);
  }
};

struct Source {
  const void* data;
  PairLayout layout;
  float scale;
};

// The columns of up to kBlock elements that lie together; writes up to a multiple of 8.
template <class K>
PSAP_INLINE void block_columns(const typename K::T* x, int64_t n, float scale, const Bins& bins,
                               int32_t* column) {
  typename K::T tail[8] = {};
  const i32x8 below = i32x8{} - 1, beyond = i32x8{} + bins.bins;
  for (int64_t i = 0; i < n; i += 8) {
    const typename K::T* from = x + i;
    if (n - i < 8) {
      std::memcpy(tail, from, (n - i) * sizeof *x);
      from = tail;
    }
    f32x8 v;
    K::load(from, v);
    const f32x8 product = v * scale;  // its sign does not matter
    // NaNs differ in their bits; all of them get the largest key.
    const i32x8 key = ((i32x8)product | (product != product)) & 0x7fffffff;
    i32x8 at = (key - bins.first) >> bins.shift;
    at = at > below ? at : below;
    at = at < beyond ? at : beyond;
    at += 1;
    std::memcpy(column + i, &at, sizeof at);
  }
}

// Elements `from` to `to`, at most kBlock, in the order of the layout.
using Columns = void (*)(const Source&, int64_t from, int64_t to, const Bins&, int32_t* column);

template <class K>
PSAP_INLINE void columns(const Source& source, int64_t from, int64_t to, const Bins& bins,
                         int32_t* column) {
  const typename K::T* x = static_cast<const typename K::T*>(source.data);
  if (source.layout.dense()) {
    return block_columns<K>(x + from, to - from, source.scale, bins, column);
  }
  typename K::T block[kBlock];
  int64_t filled = 0;
  source.layout.for_each_run(from, to, [&](int64_t a, int64_t, const Dim& dim) {
    for (int64_t i = 0; i < dim.size; i++) block[filled++] = x[a + i * dim.a];
  });
  block_columns<K>(block, filled, source.scale, bins, column);
}

template <class K>
void columns_portable(const Source& source, int64_t from, int64_t to, const Bins& bins,
                      int32_t* column) {
  columns<K>(source, from, to, bins, column);
}

#if PSAP_HAS_AVX2
template <class K>
PSAP_TARGET_AVX2 void columns_avx2(const Source& source, int64_t from, int64_t to, const Bins& bins,
                                   int32_t* column) {
  columns<K>(source, from, to, bins, column);
}
#define PSAP_CHOOSE(PORTABLE, AVX2) (avx2 ? columns_avx2<AVX2> : columns_portable<PORTABLE>)
#else
#define PSAP_CHOOSE(PORTABLE, AVX2) columns_portable<PORTABLE>
#endif

Columns choose(ScalarType dtype, bool avx2) {
  (void)avx2;
  switch (dtype) {
    case ScalarType::Float:
      return PSAP_CHOOSE(Float32Keys, Float32Keys);
    case ScalarType::Double:
      return PSAP_CHOOSE(Float64Keys, Float64Keys);
    case ScalarType::BFloat16:
      return PSAP_CHOOSE(BFloat16Keys, BFloat16Keys);
    case ScalarType::Half:
      return PSAP_CHOOSE(Float16Keys<Isa::kPortable>, Float16Keys<Isa::kAvx2>);
    default:
      STD_TORCH_CHECK(false, "abs_histogram: tensors must be float32, float64, bfloat16, float16");
  }
}
#undef PSAP_CHOOSE

void add(const int32_t* column, int64_t n, Local& local) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    for (int t = 0; t < 4; t++) local.count[t][column[i + t]]++;
  }
  for (; i < n; i++) local.count[0][column[i]]++;
}

struct Piece {
  int64_t tensor, from, to;
};

Tensor abs_histogram(const std::vector<Tensor>& tensors, const Tensor& scales, int64_t first,
                     int64_t shift, int64_t bins) {
  const int64_t n = static_cast<int64_t>(tensors.size());
  STD_TORCH_CHECK(scales.is_cpu() && scales.scalar_type() == ScalarType::Float &&
                      scales.dim() == 1 && scales.size(0) == n,
                  "abs_histogram: scales must be a float32 CPU tensor [L], one for each tensor");
  STD_TORCH_CHECK(0 <= first && first <= INT32_MAX && 0 <= shift && shift <= 30 && 1 <= bins &&
                      bins <= kMaxBins,
                  "abs_histogram: first, shift or bins is out of range");
  const bool avx2 = use_avx2();
  std::vector<Source> sources;
  std::vector<Columns> loops;
  std::vector<Piece> pieces;
  for (int64_t t = 0; t < n; t++) {
    const Tensor& x = tensors[t];
    STD_TORCH_CHECK(x.is_cpu(), "abs_histogram: tensors must be on the CPU");
    const auto sizes = x.sizes();
    const int64_t* strides = x.strides().data();
    sources.push_back({x.const_data_ptr(), PairLayout(sizes.data(), strides, strides, sizes.size()),
                       scales.const_data_ptr<float>()[t * scales.stride(0)]});
    loops.push_back(choose(x.scalar_type(), avx2));
    const int64_t count = sources[t].layout.count();
    for (int64_t at = 0; at < count; at += kPieceElements) {
      pieces.push_back({t, at, std::min(count, at + kPieceElements)});
    }
  }
  Tensor out = torch::stable::new_empty(scales, {n, bins + 2}, ScalarType::Long);
  int64_t* counts = out.mutable_data_ptr<int64_t>();
  std::fill_n(counts, n * (bins + 2), int64_t{0});
  const Bins wanted{static_cast<int32_t>(first), static_cast<int>(shift),
                    static_cast<int32_t>(bins)};
  std::mutex mutex;
  const auto read = [&](const Piece& piece, const auto& count) {
    int32_t column[kBlock];
    for (int64_t at = piece.from; at < piece.to; at += kBlock) {
      const int64_t to = std::min(piece.to, at + kBlock);
      loops[piece.tensor](sources[piece.tensor], at, to, wanted, column);
      count(column, to - at);
    }
  };
  const auto work = [&](int64_t begin, int64_t end) {
    const std::unique_ptr<Local> local(new Local());
    uint32_t held = 0;  // pieces: a count of 32 bits must not overflow
    for (int64_t p = begin; p < end; p++) {
      const Piece& piece = pieces[p];
      int64_t* row = counts + piece.tensor * (bins + 2);
      if (sources[piece.tensor].layout.count() <= kSmall) {  // no other thread has a piece of it
        read(piece, [&](const int32_t* column, int64_t n) {
          for (int64_t i = 0; i < n; i++) row[column[i]]++;
        });
        continue;
      }
      read(piece, [&](const int32_t* column, int64_t n) { add(column, n, *local); });
      const bool last = p + 1 == end || pieces[p + 1].tensor != piece.tensor;
      if (last || ++held == 1 << 15) {
        const std::lock_guard<std::mutex> lock(mutex);
        for (int64_t b = 0; b < bins + 2; b++) {
          for (const auto& table : local->count) row[b] += table[b];
        }
        *local = Local();
        held = 0;
      }
    }
  };
  torch::stable::parallel_for(0, static_cast<int64_t>(pieces.size()), 1, work);
  return out;
}

}  // namespace
}  // namespace psap

STABLE_TORCH_LIBRARY_IMPL(psap, CPU, m) {
  m.impl("abs_histogram", TORCH_BOX(&psap::abs_histogram));
}
