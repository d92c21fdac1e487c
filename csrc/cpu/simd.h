// Vectors of 32 bytes in the compiler's own vector extension (GCC, Clang): AVX2 inside a function
// with that target, pairs of SSE2 or NEON registers elsewhere. One source, the same bits.
// Everything is inlined by force: a call would pass 32 bytes differently with and without AVX.
#pragma once

#include <cstdint>
#include <cstring>

#include "../core/macros.h"

namespace psap {

typedef float f32x8 __attribute__((vector_size(32)));
typedef float f32x4 __attribute__((vector_size(16)));
typedef int32_t i32x4 __attribute__((vector_size(16)));
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));
typedef double f64x4 __attribute__((vector_size(32)));
typedef int64_t i64x4 __attribute__((vector_size(32)));

template <class V>
PSAP_INLINE V load_unaligned(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

// Instruction sets. Conversions are exact, so that the choice does not change a bit; GCC makes
// many instructions of a widening conversion, so AVX2 has its own.
enum class Isa { kPortable, kAvx2 };

template <Isa>
struct Convert {
  static PSAP_INLINE f64x4 widen(const f32x4& x) { return __builtin_convertvector(x, f64x4); }
  static PSAP_INLINE f64x4 widen(const i32x4& x) { return __builtin_convertvector(x, f64x4); }
};

#if defined(__x86_64__) && defined(__GNUC__)
template <>
struct Convert<Isa::kAvx2> {
  static PSAP_INLINE f64x4 widen(const f32x4& x) {
    f64x4 d;
    asm("vcvtps2pd %1, %0" : "=x"(d) : "x"(x));
    return d;
  }
  static PSAP_INLINE f64x4 widen(const i32x4& x) {
    f64x4 d;
    asm("vcvtdq2pd %1, %0" : "=x"(d) : "x"(x));
    return d;
  }
};
#endif

// The sums of the lanes of four vectors, each as (0 + 1) + (2 + 3).
PSAP_INLINE f64x4 lane_sums(const f64x4& a, const f64x4& b, const f64x4& c, const f64x4& d) {
  const f64x4 ab =
      __builtin_shufflevector(a, b, 0, 4, 2, 6) + __builtin_shufflevector(a, b, 1, 5, 3, 7);
  const f64x4 cd =
      __builtin_shufflevector(c, d, 0, 4, 2, 6) + __builtin_shufflevector(c, d, 1, 5, 3, 7);
  return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

// Arithmetic in float, 8 lanes.
template <Isa isa>
struct Arith32 {
  using V = f32x8;
  using I = i32x8;
  static constexpr int kLanes = 8;
  static PSAP_INLINE V splat(double x) { return V{} + static_cast<float>(x); }
  static PSAP_INLINE V absolute(const V& x) { return (V)((I)x & 0x7fffffff); }
  static PSAP_INLINE I below(const V& x, const V& limit) { return -(x < limit); }
  // Lanes j and j + 4 added in double.
  static PSAP_INLINE f64x4 fold(const V& x) {
    return Convert<isa>::widen(__builtin_shufflevector(x, x, 0, 1, 2, 3)) +
           Convert<isa>::widen(__builtin_shufflevector(x, x, 4, 5, 6, 7));
  }
  static PSAP_INLINE f64x4 fold(const I& x) {
    return Convert<isa>::widen(__builtin_shufflevector(x, x, 0, 1, 2, 3) +
                               __builtin_shufflevector(x, x, 4, 5, 6, 7));
  }
};

// Arithmetic in double, 4 lanes.
template <Isa isa>
struct Arith64 {
  using V = f64x4;
  using I = i64x4;
  static constexpr int kLanes = 4;
  static PSAP_INLINE V splat(double x) { return V{} + x; }
  static PSAP_INLINE V absolute(const V& x) { return (V)((I)x & INT64_MAX); }
  static PSAP_INLINE I below(const V& x, const V& limit) { return -(x < limit); }
  static PSAP_INLINE f64x4 fold(const V& x) { return x; }
  static PSAP_INLINE f64x4 fold(const I& x) { return __builtin_convertvector(x, f64x4); }
};

// How each dtype is stored, loaded as kVectors vectors, and recognised as not finite (all exponent
// bits set). The order of the lanes within a load is free, since w and g share it; element e of a
// load is lane slot(e), counted through all its vectors.
template <Isa isa>
struct Float32 {
  using Arith = Arith32<isa>;
  using T = uint32_t;
  static constexpr T kExponent = 0x7f800000;
  static constexpr int kVectors = 1;
  static PSAP_INLINE int64_t slot(int64_t e) { return e; }
  static PSAP_INLINE void load(const T* p, f32x8* v) { v[0] = load_unaligned<f32x8>(p); }
};

template <Isa isa>
struct Float64 {
  using Arith = Arith64<isa>;
  using T = uint64_t;
  static constexpr T kExponent = 0x7ff0000000000000;
  static constexpr int kVectors = 1;
  static PSAP_INLINE int64_t slot(int64_t e) { return e; }
  static PSAP_INLINE void load(const T* p, f64x4* v) { v[0] = load_unaligned<f64x4>(p); }
};

template <Isa isa>
struct BFloat16 {
  using Arith = Arith32<isa>;
  using T = uint16_t;
  static constexpr T kExponent = 0x7f80;
  static constexpr int kVectors = 2;
  static PSAP_INLINE int64_t slot(int64_t e) { return e % 2 * 8 + e / 2; }
  // 16 elements: those at even places, those at odd places; nothing is widened.
  static PSAP_INLINE void load(const T* p, f32x8* v) {
    const u32x8 both = load_unaligned<u32x8>(p);
    v[0] = (f32x8)(both << 16);
    v[1] = (f32x8)(both & 0xffff0000u);
  }
};

template <Isa isa>
struct Float16 {
  using Arith = Arith32<isa>;
  using T = uint16_t;
  static constexpr T kExponent = 0x7c00;
  static constexpr int kVectors = 1;
  static PSAP_INLINE int64_t slot(int64_t e) { return e; }
  // In integers, since F16C is not everywhere: move the fields into place and add the difference of
  // the exponent biases (112), twice for Inf and NaN. A subnormal becomes 2^-14 * (1 + m), less
  // 2^-14: exact, and untouched by flush-to-zero.
  static PSAP_INLINE void load(const T* p, f32x8* v) {
    const u32x8 half = __builtin_convertvector(load_unaligned<u16x8>(p), u32x8);
    const u32x8 sign = (half & 0x8000u) << 16;
    const u32x8 fields = (half & 0x7fffu) << 13;
    const u32x8 special = (u32x8)((i32x8)fields > 0x0f7fffff);
    const u32x8 subnormal = (u32x8)((i32x8)fields < 0x00800000);
    const u32x8 normal = fields + 0x38000000u + (special & 0x38000000u);
    const u32x8 tiny = (u32x8)((f32x8)(fields + 0x38800000u) - 0x1p-14f);
    v[0] = (f32x8)((normal & ~subnormal) | (tiny & subnormal) | sign);
  }
};

#if defined(__x86_64__) && defined(__GNUC__)
// "avx2" means F16C too (capability.h). A quiet NaN for a signalling one is all that differs from
// the integers above, and no result tells NaNs apart.
template <>
PSAP_INLINE void Float16<Isa::kAvx2>::load(const T* p, f32x8* v) {
  const u16x8 half = load_unaligned<u16x8>(p);
  asm("vcvtph2ps %1, %0" : "=x"(v[0]) : "x"(half));
}
#endif

}  // namespace psap
