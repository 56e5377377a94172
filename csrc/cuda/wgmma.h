// wgmma of 16-bit values into fp32: [64, N] += [64, 16] x [N, 16]ᵀ, A from shared memory or registers; of e4m3 [64, 32]
// x [N, 32]ᵀ, A from either as well. PTX ISA, "wgmma".
#pragma once
#include <cstdint>

#include "cuda/activations.h"

namespace vitlr::cuda::lowrank {

// %0 to %(N/2 - 1), and as many operands.
#define VITLR_T(t) "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9"
#define VITLR_NAMES_32 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9," VITLR_T(1) "," VITLR_T(2) ",%30,%31"
#define VITLR_NAMES_48 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9," VITLR_T(1) "," VITLR_T(2) "," VITLR_T(3) ",%40,%41,%42,%43,%44,%45,%46,%47"
#define VITLR_NAMES_64 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9," VITLR_T(1) "," VITLR_T(2) "," VITLR_T(3) "," VITLR_T(4) "," VITLR_T(5) \
  ",%60,%61,%62,%63"
#define VITLR_NAMES_96 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9," VITLR_T(1) "," VITLR_T(2) "," VITLR_T(3) "," VITLR_T(4) "," VITLR_T(5) \
  "," VITLR_T(6) "," VITLR_T(7) "," VITLR_T(8) ",%90,%91,%92,%93,%94,%95"
#define VITLR_NAMES_112 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9," VITLR_T(1) "," VITLR_T(2) "," VITLR_T(3) "," VITLR_T(4) "," VITLR_T(5) \
  "," VITLR_T(6) "," VITLR_T(7) "," VITLR_T(8) "," VITLR_T(9) "," VITLR_T(10) ",%110,%111"
#define VITLR_NAMES_128 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9," VITLR_T(1) "," VITLR_T(2) "," VITLR_T(3) "," VITLR_T(4) "," VITLR_T(5) \
  "," VITLR_T(6) "," VITLR_T(7) "," VITLR_T(8) "," VITLR_T(9) "," VITLR_T(10) "," VITLR_T(11) \
  ",%120,%121,%122,%123,%124,%125,%126,%127"
#define VITLR_D8(c, i)                                                                                            \
  c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3]), c(d[i + 4]), c(d[i + 5]), c(d[i + 6]), c(d[i + 7])
#define VITLR_D32(c, i) VITLR_D8(c, i), VITLR_D8(c, i + 8), VITLR_D8(c, i + 16), VITLR_D8(c, i + 24)
#define VITLR_VALUES_32(c) VITLR_D32(c, 0)
#define VITLR_VALUES_48(c) VITLR_D32(c, 0), VITLR_D8(c, 32), VITLR_D8(c, 40)
#define VITLR_VALUES_64(c) VITLR_D32(c, 0), VITLR_D32(c, 32)
#define VITLR_VALUES_96(c) VITLR_D32(c, 0), VITLR_D32(c, 32), VITLR_D32(c, 64)
#define VITLR_VALUES_112(c) VITLR_VALUES_96(c), VITLR_D8(c, 96), VITLR_D8(c, 104)
#define VITLR_VALUES_128(c) VITLR_D32(c, 0), VITLR_D32(c, 32), VITLR_D32(c, 64), VITLR_D32(c, 96)

// `set` sets d, the others add to it. What d held before is no input of `set`, so its registers are free until then.
// The numbers at the end: scale of A, of B, and not transposed.
template <int N, class T>
struct Wgmma;

// C: registers of an accumulator, N / 2; P0 to P4: the numbers of the operands that follow them.
#define VITLR_WGMMA_FORM(N, C, NAME, FUNCTION, CONSTRAINT, ARGUMENTS, PREDICATE, OPERANDS, ENDING, ...)               \
  static __device__ __forceinline__ void FUNCTION ARGUMENTS {                                                         \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " PREDICATE ", 0;\n"                                               \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" VITLR_NAMES_##C "}, " OPERANDS  \
                 ", p, 1, 1, " ENDING ";\n}\n"                                                                        \
                 : VITLR_VALUES_##C(CONSTRAINT)                                                                       \
                 : __VA_ARGS__);                                                                                      \
  }
#define VITLR_WGMMA(N, C, TYPE, NAME, P0, P1, P2, P3, P4)                                                         \
  template <>                                                                                                         \
  struct Wgmma<N, TYPE> {                                                                                             \
    VITLR_WGMMA_FORM(N, C, NAME, shared, "+f", (float (&d)[C], uint64_t a, uint64_t b), "1",             \
                     "%" #P0 ", %" #P1, "0, 0", "l"(a), "l"(b))                                             \
    VITLR_WGMMA_FORM(N, C, NAME, set_shared, "=f", (float (&d)[C], uint64_t a, uint64_t b), "0",                      \
                     "%" #P0 ", %" #P1, "0, 0", "l"(a), "l"(b))                                                       \
    VITLR_WGMMA_FORM(N, C, NAME, registers, "+f",                                                                     \
                     (float (&d)[C], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b),        \
                     "1", "{%" #P0 ", %" #P1 ", %" #P2 ", %" #P3 "}, %" #P4, "0", "r"(a0), "r"(a1), "r"(a2),      \
                     "r"(a3), "l"(b))                                                                       \
    VITLR_WGMMA_FORM(N, C, NAME, set_registers, "=f",                                                                 \
                     (float (&d)[C], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b), "0",            \
                     "{%" #P0 ", %" #P1 ", %" #P2 ", %" #P3 "}, %" #P4, "0", "r"(a0), "r"(a1), "r"(a2), "r"(a3),      \
                     "l"(b))                                                                                          \
  };

#define VITLR_WGMMAS(TYPE, NAME)                                   \
  VITLR_WGMMA(64, 32, TYPE, NAME, 32, 33, 34, 35, 36)          \
  VITLR_WGMMA(96, 48, TYPE, NAME, 48, 49, 50, 51, 52)          \
  VITLR_WGMMA(128, 64, TYPE, NAME, 64, 65, 66, 67, 68)         \
  VITLR_WGMMA(192, 96, TYPE, NAME, 96, 97, 98, 99, 100)       \
  VITLR_WGMMA(256, 128, TYPE, NAME, 128, 129, 130, 131, 132)

VITLR_WGMMAS(Bf16, "bf16")
VITLR_WGMMAS(Fp16, "f16")

#define VITLR_WGMMA_BYTES_FORM(N, C, FUNCTION, CONSTRAINT, ARGUMENTS, PREDICATE, OPERANDS, ...)                     \
  static __device__ __forceinline__ void FUNCTION ARGUMENTS {                                                        \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " PREDICATE ", 0;\n"                                              \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" VITLR_NAMES_##C "}, " OPERANDS          \
                 ", p, 1, 1;\n}\n"                                                                                   \
                 : VITLR_VALUES_##C(CONSTRAINT)                                                                       \
                 : __VA_ARGS__);                                                                                      \
  }
// As above; P4 is that of B where A is in registers. `shared`: `add` to what d held, else d is set.
#define VITLR_WGMMA_BYTES(N, C, P0, P1, P2, P3, P4)                                                                  \
  template <>                                                                                                        \
  struct Wgmma<N, E4m3> {                                                                                            \
    VITLR_WGMMA_BYTES_FORM(N, C, shared, "+f", (float (&d)[C], uint64_t a, uint64_t b, bool add), "%" #P2,            \
                           "%" #P0 ", %" #P1, "l"(a), "l"(b), "r"(static_cast<int>(add)))                             \
    VITLR_WGMMA_BYTES_FORM(N, C, set_shared, "=f", (float (&d)[C], uint64_t a, uint64_t b), "0", "%" #P0 ", %" #P1,   \
                           "l"(a), "l"(b))                                                                            \
    VITLR_WGMMA_BYTES_FORM(N, C, registers, "+f",                                                                     \
                           (float (&d)[C], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b), "1",      \
                           "{%" #P0 ", %" #P1 ", %" #P2 ", %" #P3 "}, %" #P4, "r"(a0), "r"(a1), "r"(a2), "r"(a3),     \
                           "l"(b))                                                                                    \
    VITLR_WGMMA_BYTES_FORM(N, C, set_registers, "=f",                                                                 \
                           (float (&d)[C], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b), "0",      \
                           "{%" #P0 ", %" #P1 ", %" #P2 ", %" #P3 "}, %" #P4, "r"(a0), "r"(a1), "r"(a2), "r"(a3),     \
                           "l"(b))                                                                                    \
  };

VITLR_WGMMA_BYTES(128, 64, 64, 65, 66, 67, 68)
VITLR_WGMMA_BYTES(192, 96, 96, 97, 98, 99, 100)
VITLR_WGMMA_BYTES(224, 112, 112, 113, 114, 115, 116)
VITLR_WGMMA_BYTES(256, 128, 128, 129, 130, 131, 132)

}  // namespace vitlr::cuda::lowrank
