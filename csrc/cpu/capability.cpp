#include "capability.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace psap {
namespace {

bool machine_has_avx2() {
#if PSAP_HAS_AVX2
  static const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  return has;
#else
  return false;
#endif
}

}  // namespace

bool use_avx2() {
  const char* wanted = std::getenv("PSAP_CPU_CAPABILITY");
  const std::string name = wanted ? wanted : "";
  if (name.empty()) return machine_has_avx2();
  if (name == "default") return false;
  if (name == "avx2" && machine_has_avx2()) return true;
  throw std::runtime_error(
      "PSAP_CPU_CAPABILITY is '" + name + "', wanted " +
      (machine_has_avx2() ? "'avx2' or 'default'" : "'default' (no AVX2 here)") +
      ": set it to one of these, or unset it");
}

const char* cpu_capability() { return use_avx2() ? "avx2" : "default"; }

}  // namespace psap
