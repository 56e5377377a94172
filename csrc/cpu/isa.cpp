#include "cpu/isa.h"

#include <stdexcept>
#include <string>
#include <vector>

namespace vitlr {
namespace {

std::vector<Isa> runnable() {  // best first
  std::vector<Isa> isas;
#ifdef VITLR_WITH_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")) {
#ifdef VITLR_WITH_AVX512_BF16
    if (__builtin_cpu_supports("avx512bf16")) isas.push_back(kAvx512Bf16);
#endif
    isas.push_back(kAvx512);
  }
#endif
#ifdef VITLR_WITH_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) isas.push_back(kAvx2);
#endif
  isas.push_back(kPortable);
  return isas;
}

}  // namespace

const char* name_of(Isa isa) {
  static const char* const names[] = {"portable", "avx2", "avx512", "avx512_bf16"};
  return names[isa];
}

Isa select_isa(const char* name) {
  static const std::vector<Isa> isas = runnable();
  std::string names;
  for (Isa isa : isas) {
    if (!*name || std::string(name) == name_of(isa)) return isa;
    names += std::string(names.empty() ? "" : ", ") + name_of(isa);
  }
  throw std::invalid_argument("VITLR_CPU_ISA=" + std::string(name) +
                              " was not built or does not run on this CPU; expected one of " + names);
}

}  // namespace vitlr
