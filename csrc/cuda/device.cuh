// What the kernels need of CUDA, and what all of them share. With PSAP_EMU the same sources are C++
// for the emulator (csrc/emu), which runs them in the tests.
#pragma once

#ifdef PSAP_EMU
#include "../emu/cuda_api.h"
#else
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define PSAP_GRID_CONSTANT __grid_constant__
#define PSAP_SHARED(TYPE, NAME, ...) __shared__ TYPE NAME __VA_ARGS__
#define PSAP_LAUNCH(KERNEL, GRID, BLOCK, STREAM, ...) \
  KERNEL<<<static_cast<unsigned>(GRID), BLOCK, 0, STREAM>>>(__VA_ARGS__)
#endif

#include <cstdint>
#include <cstring>

#include "../core/macros.h"

namespace psap {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// How elements are stored; the numbers are those of the metadata.
enum Dtype : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

PSAP_HD inline int element_size(int32_t dtype) {
  return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2;
}

// Sum over a warp; every lane gets it. The tree is fixed, so are the bits.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, step);
  }
  return value;
}

// Sums eight values over a warp with 9 exchanges instead of 40: in each of the first three steps a
// lane gives half of its values away and keeps the others. Returns the sum number lane / 4.
__device__ __forceinline__ double warp_sum8(double (&v)[8], int lane) {
#pragma unroll
  for (int keep = 4; keep > 0; keep /= 2) {
    const bool upper = lane & (4 * keep);
#pragma unroll
    for (int i = 0; i < keep; i++) {
      const double kept = upper ? v[i + keep] : v[i];
      const double given = upper ? v[i] : v[i + keep];
      v[i] = kept + __shfl_xor_sync(kAllLanes, given, 4 * keep);
    }
  }
  v[0] += __shfl_xor_sync(kAllLanes, v[0], 2);
  return v[0] + __shfl_xor_sync(kAllLanes, v[0], 1);
}

// True, in every thread, in the block that takes the last of `count` tickets: it sees what the
// others wrote before they took theirs (read it with __ldcg). The ticket is zero again then, as the
// next launch on this stream wants it. All threads of a block call it.
__device__ __forceinline__ bool last_ticket(unsigned int* ticket, unsigned int count) {
  PSAP_SHARED(bool, last);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(ticket, 1u) == count - 1;
    if (last) *ticket = 0;
  }
  __syncthreads();
  if (last) __threadfence();
  return last;
}

// One dtype: T as it is stored, V as it is computed with.
struct LoadFloat32 {
  using T = float;
  using V = float;
  static constexpr uint32_t kExponent = 0x7f800000;
  static __device__ __forceinline__ V value(T x) { return x; }
  static __device__ __forceinline__ bool nonfinite(T x) {
    return (__float_as_uint(x) & kExponent) == kExponent;
  }
};

struct LoadFloat64 {
  using T = double;
  using V = double;
  static __device__ __forceinline__ V value(T x) { return x; }
  static __device__ __forceinline__ bool nonfinite(T x) {
    return !(fabs(x) <= 1.7976931348623157e308);
  }
};

struct LoadBFloat16 {
  using T = uint16_t;
  using V = float;
  static __device__ __forceinline__ V value(T x) {
    return __uint_as_float(static_cast<uint32_t>(x) << 16);
  }
  static __device__ __forceinline__ bool nonfinite(T x) { return (x & 0x7f80) == 0x7f80; }
};

struct LoadFloat16 {
  using T = uint16_t;
  using V = float;
  static __device__ __forceinline__ V value(T x) { return __half2float(__ushort_as_half(x)); }
  static __device__ __forceinline__ bool nonfinite(T x) { return (x & 0x7c00) == 0x7c00; }
};

// Calls body(Load{}) for a dtype; the branch is the same for a whole block.
template <class F>
__device__ __forceinline__ void with_dtype(int32_t dtype, const F& body) {
  switch (dtype) {
    case kFloat32:
      return body(LoadFloat32{});
    case kFloat64:
      return body(LoadFloat64{});
    case kBFloat16:
      return body(LoadBFloat16{});
    default:
      return body(LoadFloat16{});
  }
}

// 16 bytes at once; the address must be a multiple of 16.
__device__ __forceinline__ uint4 load128(const void* from) {
  return __ldg(static_cast<const uint4*>(from));
}

// 16 bytes as elements.
template <class T>
struct Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T element[kSize];
  __device__ __forceinline__ explicit Vector(const uint4& bits) {
    memcpy(element, &bits, sizeof bits);
  }
  __device__ __forceinline__ explicit Vector(const void* from) : Vector(load128(from)) {}
};

PSAP_HD inline unsigned misalignment(const void* p) {
  return static_cast<unsigned>(reinterpret_cast<uintptr_t>(p) & 15);
}

// Strides of up to four dimensions that could not be merged, outermost first; sizes of unused ones
// are 1. What is one run of stride 1 needs none.
struct Strided {
  int32_t size[4];
  int64_t a[4], b[4];

  // 32 bits: division of 64 bits is a call, and takes a stack.
  __device__ __forceinline__ void offsets(uint32_t index, int64_t* in_a, int64_t* in_b) const {
    int64_t first = 0, second = 0;
#pragma unroll 1
    for (int d = 3; d >= 0; d--) {
      const uint32_t at = index % static_cast<uint32_t>(size[d]);
      index /= static_cast<uint32_t>(size[d]);
      first += at * a[d];
      second += at * b[d];
    }
    *in_a = first;
    *in_b = second;
  }
};

}  // namespace psap
