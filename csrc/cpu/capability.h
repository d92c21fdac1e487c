// Which instruction set the kernels use on this machine.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#define PSAP_HAS_AVX2 1
#define PSAP_TARGET_AVX2 __attribute__((target("avx2,f16c")))
#else
#define PSAP_HAS_AVX2 0
#endif

namespace psap {

// "avx2" (with F16C, which every processor with AVX2 has) or "default". Found by cpuid; the
// environment variable PSAP_CPU_CAPABILITY (default | avx2) overrides it and is read at every call,
// so that a test can switch. Throws std::runtime_error where the variable asks for what this
// machine lacks.
const char* cpu_capability();

bool use_avx2();

}  // namespace psap
