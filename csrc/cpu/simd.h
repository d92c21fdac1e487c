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

// Arithmetic in float, 8 lanes.
struct Arith32 {
  using V = f32x8;
  using I = i32x8;
  static PSAP_INLINE V splat(double x) { return V{} + static_cast<float>(x); }
  static PSAP_INLINE V absolute(const V& x) { return (V)((I)x & 0x7fffffff); }
  static PSAP_INLINE I below(const V& x, const V& limit) { return -(x < limit); }
  // Lanes j and j + 4 first, then a pairwise tree, all in double.
  static PSAP_INLINE double total(const V& x) {
    const char* bytes = reinterpret_cast<const char*>(&x);
    const f64x4 d = __builtin_convertvector(load_unaligned<f32x4>(bytes), f64x4) +
                    __builtin_convertvector(load_unaligned<f32x4>(bytes + 16), f64x4);
    return (d[0] + d[1]) + (d[2] + d[3]);
  }
  static PSAP_INLINE int64_t total(const I& x) {
    const char* bytes = reinterpret_cast<const char*>(&x);
    const i32x4 i = load_unaligned<i32x4>(bytes) + load_unaligned<i32x4>(bytes + 16);
    return (i[0] + i[1]) + (i[2] + i[3]);
  }
};

// Arithmetic in double, 4 lanes.
struct Arith64 {
  using V = f64x4;
  using I = i64x4;
  static PSAP_INLINE V splat(double x) { return V{} + x; }
  static PSAP_INLINE V absolute(const V& x) { return (V)((I)x & INT64_MAX); }
  static PSAP_INLINE I below(const V& x, const V& limit) { return -(x < limit); }
  static PSAP_INLINE double total(const V& d) { return (d[0] + d[1]) + (d[2] + d[3]); }
  static PSAP_INLINE int64_t total(const I& i) { return (i[0] + i[1]) + (i[2] + i[3]); }
};

// How each dtype is stored, loaded, and recognised as not finite (all exponent bits set).
struct Float32 {
  using Arith = Arith32;
  using T = uint32_t;
  static constexpr T kExponent = 0x7f800000;
  static PSAP_INLINE f32x8 load(const T* p) { return load_unaligned<f32x8>(p); }
};

struct Float64 {
  using Arith = Arith64;
  using T = uint64_t;
  static constexpr T kExponent = 0x7ff0000000000000;
  static PSAP_INLINE f64x4 load(const T* p) { return load_unaligned<f64x4>(p); }
};

struct BFloat16 {
  using Arith = Arith32;
  using T = uint16_t;
  static constexpr T kExponent = 0x7f80;
  static PSAP_INLINE f32x8 load(const T* p) {
    return (f32x8)(__builtin_convertvector(load_unaligned<u16x8>(p), u32x8) << 16);
  }
};

struct Float16 {
  using Arith = Arith32;
  using T = uint16_t;
  static constexpr T kExponent = 0x7c00;
  // In integers, since F16C is not everywhere: move the fields into place and add the difference of
  // the exponent biases (112), twice for Inf and NaN. A subnormal becomes 2^-14 * (1 + m), less
  // 2^-14: exact, and untouched by flush-to-zero.
  static PSAP_INLINE f32x8 load(const T* p) {
    const u32x8 half = __builtin_convertvector(load_unaligned<u16x8>(p), u32x8);
    const u32x8 sign = (half & 0x8000u) << 16;
    const u32x8 fields = (half & 0x7fffu) << 13;
    const u32x8 special = (u32x8)((i32x8)fields > 0x0f7fffff);
    const u32x8 subnormal = (u32x8)((i32x8)fields < 0x00800000);
    const u32x8 normal = fields + 0x38000000u + (special & 0x38000000u);
    const u32x8 tiny = (u32x8)((f32x8)(fields + 0x38800000u) - 0x1p-14f);
    return (f32x8)((normal & ~subnormal) | (tiny & subnormal) | sign);
  }
};

}  // namespace psap
