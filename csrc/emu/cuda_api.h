// What kernels call by CUDA's names, on the emulator.
#pragma once

#include "emulator.h"

namespace emu {

template <class T>
void require_aligned(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % alignof(T))
    throw Error("an access is not aligned" + where());
}

template <class T>
T shuffle(const char* what, unsigned mask, T value, int from) {
  static_assert(sizeof(T) <= 8, "shuffles move up to 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  meet(what, mask, bits);
  if (from < 0 || from > 31 || !(mask >> from & 1)) {
    throw Error(std::string(what) + ": reads a lane outside of the mask" + where());
  }
  bits = left_by(from);
  me().parity ^= 1;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace emu

#define threadIdx ::emu::thread_index
#define blockIdx ::emu::block_index
#define blockDim ::emu::block_dim
#define gridDim ::emu::grid_dim

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return emu::shuffle("__shfl_xor_sync", mask, value, (emu::active->current % 32) ^ lanes);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int from) {
  return emu::shuffle("__shfl_sync", mask, value, from);
}
inline unsigned __ballot_sync(unsigned mask, bool vote) {
  emu::meet("__ballot_sync", mask, vote);
  unsigned result = 0;
  for (int lane = 0; lane < 32; lane++) {
    if (mask >> lane & 1 && emu::left_by(lane)) result |= 1u << lane;
  }
  emu::me().parity ^= 1;
  return result;
}
inline void __syncthreads() {
  emu::active->at_barrier++;
  emu::me().barriers++;
  emu::me().state = emu::kAtBlock;
  emu::release_block();
  if (emu::me().state == emu::kAtBlock) emu::wait(emu::kAtBlock);
}
inline void __threadfence() {}
[[noreturn]] inline void __trap() { throw emu::Error("__trap" + emu::where()); }
template <class T>
T __ldg(const T* p) {
  emu::require_aligned(p);
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return __ldg(p);
}
template <class T>
T atomicAdd(T* p, T value) {
  const T before = *p;
  *p += value;
  return before;
}
inline unsigned atomicOr(unsigned* p, unsigned value) {
  const unsigned before = *p;
  *p |= value;
  return before;
}
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline float __half2float(__half half) {
  const uint32_t exponent = half.bits >> 10 & 31, fraction = half.bits & 1023;
  float x = std::ldexp(static_cast<float>(exponent ? fraction | 1024 : fraction),
                       static_cast<int>(exponent ? exponent : 1) - 25);
  if (exponent == 31) x = fraction ? NAN : INFINITY;
  return half.bits & 0x8000 ? -x : x;
}
