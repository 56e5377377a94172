// Which micro-kernels of chains of integers an instruction set runs; `run_chain` drives them.
#include "cpu/chain.h"

namespace vitlr {

const ChainKernel& int8_chain_kernel(Isa isa, bool bf16) {
#ifdef VITLR_WITH_AMX_INT8
  if (isa >= kAmxInt8) return bf16 ? int8_chain_bf16_amx_int8() : int8_chain_fp32_amx_int8();
#endif
#ifdef VITLR_WITH_AVX512_BF16
  if (isa >= kAvx512Bf16) return bf16 ? int8_chain_bf16_avx512_bf16() : int8_chain_fp32_avx512_bf16();
#endif
#ifdef VITLR_WITH_AVX512_VNNI
  if (isa >= kAvx512Vnni) return bf16 ? int8_chain_bf16_avx512_vnni() : int8_chain_fp32_avx512_vnni();
#endif
#ifdef VITLR_WITH_AVX512
  if (isa >= kAvx512) return bf16 ? int8_chain_bf16_avx512() : int8_chain_fp32_avx512();
#endif
#ifdef VITLR_WITH_AVX_VNNI
  if (isa >= kAvxVnni) return bf16 ? int8_chain_bf16_avx_vnni() : int8_chain_fp32_avx_vnni();
#endif
#ifdef VITLR_WITH_AVX2
  if (isa >= kAvx2) return bf16 ? int8_chain_bf16_avx2() : int8_chain_fp32_avx2();
#endif
  return bf16 ? int8_chain_bf16_portable() : int8_chain_fp32_portable();
}

}  // namespace vitlr
