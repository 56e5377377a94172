#include "cpu/isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <stdexcept>
#include <string>
#include <vector>

namespace vitlr {
namespace {

#if defined(__x86_64__)
// A bit of CPUID leaf 7, for what __builtin_cpu_supports of older compilers does not know.
[[maybe_unused]] bool has_bit(unsigned leaf, char where, unsigned bit) {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, leaf, &a, &b, &c, &d)) return false;
  return (where == 'a' ? a : d) >> bit & 1;
}

// Tiles hold 8 KiB that the system saves only for processes that ask for it.
[[maybe_unused]] bool may_use_tiles() {
#if defined(__linux__)
  constexpr long ask = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  const bool tiles = has_bit(0, 'd', 24), bytes = has_bit(0, 'd', 25), bf16 = has_bit(0, 'd', 22);
  return tiles && bytes && bf16 && syscall(SYS_arch_prctl, ask, tile_data) == 0;
#else
  return false;
#endif
}
#endif

std::vector<Isa> runnable() {  // best first
  std::vector<Isa> isas;
#ifdef VITLR_WITH_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")) {
    [[maybe_unused]] const bool vnni = __builtin_cpu_supports("avx512vnni");
    [[maybe_unused]] const bool bf16 = vnni && __builtin_cpu_supports("avx512bf16");
#ifdef VITLR_WITH_AMX_INT8
    if (bf16 && may_use_tiles()) isas.push_back(kAmxInt8);
#endif
#ifdef VITLR_WITH_AVX512_BF16
    if (bf16) isas.push_back(kAvx512Bf16);
#endif
#ifdef VITLR_WITH_AVX512_VNNI
    if (vnni) isas.push_back(kAvx512Vnni);
#endif
    isas.push_back(kAvx512);
  }
#endif
#ifdef VITLR_WITH_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
#ifdef VITLR_WITH_AVX_VNNI
    if (has_bit(1, 'a', 4)) isas.push_back(kAvxVnni);
#endif
    isas.push_back(kAvx2);
  }
#endif
  isas.push_back(kPortable);
  return isas;
}

}  // namespace

const char* name_of(Isa isa) {
  static const char* const names[] = {"portable", "avx2", "avx_vnni", "avx512", "avx512_vnni", "avx512_bf16", "amx_int8"};
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
