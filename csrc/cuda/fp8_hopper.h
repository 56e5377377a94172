// The policy of fp8_body.h on the GPU: hopper.h, products of e4m3, and numbers in pairs.
#pragma once
#include <cuda_fp16.h>

#include "cuda/hopper.h"

namespace vitlr::cuda::lowrank {

template <>
struct Numbers<E4m3> {
  using Halves = __half2;
  static __device__ __forceinline__ Halves halves(float a, float b) { return __floats2half2_rn(a, b); }
  static __device__ __forceinline__ Halves both(float a) { return __float2half2_rn(a); }
  static __device__ __forceinline__ float2 floats(Halves a) { return __half22float2(a); }
  static __device__ __forceinline__ Halves absolute(Halves a) { return __habs2(a); }
  static __device__ __forceinline__ Halves negative(Halves a) { return __hneg2(a); }
  static __device__ __forceinline__ Halves least(Halves a, Halves b) { return __hmin2(a, b); }
  static __device__ __forceinline__ Halves most(Halves a, Halves b) { return __hmax2(a, b); }
  static __device__ __forceinline__ Halves product(Halves a, Halves b) { return __hmul2_rn(a, b); }
  static __device__ __forceinline__ Halves fma(Halves a, Halves b, Halves c) { return __hfma2(a, b, c); }
  static __device__ __forceinline__ Halves exp2(Halves a) {
    uint32_t y;
    asm("ex2.approx.f16x2 %0, %1;" : "=r"(y) : "r"(reinterpret_cast<const uint32_t&>(a)));
    return reinterpret_cast<const Halves&>(y);
  }
  static __device__ __forceinline__ float square_root(float a) { return sqrtf(a); }

  // Two bytes of e4m3, a below b: to the nearest, ties to even, ends at ±448.
  static __device__ __forceinline__ uint16_t bytes(float a, float b) {
    uint16_t y;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(y) : "f"(b), "f"(a));
    return y;
  }
  static __device__ __forceinline__ uint16_t bytes(Halves a) {
    uint16_t y;
    asm("cvt.rn.satfinite.e4m3x2.f16x2 %0, %1;" : "=h"(y) : "r"(reinterpret_cast<const uint32_t&>(a)));
    return y;
  }
  // Two floats of a vector in device memory, zeros where there is none.
  static __device__ __forceinline__ float2 pair_of_floats(const float* vector, int index, bool there) {
    float2 two;  // predicated, no branch: it stands in unrolled loops
    asm("{\n.reg .pred p;\nsetp.ne.b32 p, %3, 0;\nmov.b32 %0, 0;\nmov.b32 %1, 0;\n@p ld.global.nc.v2.f32 {%0, %1}, [%2];\n}\n"
        : "=f"(two.x), "=f"(two.y)
        : "l"(vector + index), "r"(static_cast<int>(there)));
    return two;
  }
};

class Fp8Hopper : public Hopper<E4m3> {
 public:
  using Hopper<E4m3>::Hopper;

  __device__ __forceinline__ void store_pair(uint32_t offset, uint16_t value) {
    asm volatile("st.shared.b16 [%0], %1;" ::"r"(address(offset)), "h"(value) : "memory");
  }
  // sums = A Bᵀ of bytes, `add`: to what there is.
  template <int N>
  __device__ __forceinline__ void multiply_bytes(Registers<float, N / 2>& sums, uint64_t A, uint64_t B, bool add) {
    Wgmma<N, E4m3>::shared(sums.values, A, B, add);
  }
  // Of four neighbouring lanes, to all of them.
  template <int N>
  __device__ __forceinline__ void add_quads(Registers<float, N>& values) {
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
      for (int other = 1; other < 4; other *= 2) values.values[i] += __shfl_xor_sync(~0u, values.values[i], other);
  }
};

}  // namespace vitlr::cuda::lowrank
