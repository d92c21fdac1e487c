// Compiler attributes shared by the host and the device build.
#pragma once

#if defined(__CUDACC__)
#define PSAP_HD __host__ __device__
#else
#define PSAP_HD
#endif

// Inlining must be forced where one body is compiled for two instruction sets: a body that is left
// as a function of its own is compiled for the baseline only.
#if defined(__GNUC__)
#define PSAP_INLINE inline __attribute__((always_inline))
#else
#define PSAP_INLINE inline
#endif
