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
  // Four of them, 16 bytes apart.
  static __device__ __forceinline__ float4 four_floats(const float* vector, int index, bool there) {
    return there ? __ldg(reinterpret_cast<const float4*>(vector + index)) : float4{0, 0, 0, 0};
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
  // sums = A Bᵀ where SET, else sums += A Bᵀ.
  template <int N, bool SET = false>
  __device__ __forceinline__ void multiply_bytes(Registers<float, N / 2>& sums, uint64_t A, uint64_t B) {
    if constexpr (SET)
      Wgmma<N, E4m3>::set_shared(sums.values, A, B);
    else
      Wgmma<N, E4m3>::shared(sums.values, A, B, true);
  }
  // The same with four registers of A from `first` on.
  template <int N, bool SET = false, int COUNT>
  __device__ __forceinline__ void multiply_operand(Registers<float, N / 2>& sums, Registers<uint32_t, COUNT>& A,
                                                   int first, uint64_t B) {
    const uint32_t* a = A.values + first;
    if constexpr (SET)
      Wgmma<N, E4m3>::set_registers(sums.values, a[0], a[1], a[2], a[3], B);
    else
      Wgmma<N, E4m3>::registers(sums.values, a[0], a[1], a[2], a[3], B);
  }

  // A box whose rows come in the order of `woven`: of the five dimensions the last is sixteens of rows.
  __device__ __forceinline__ void load_woven(const Map& map, int destination, int barrier, int column, int row) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %3, %3, %4}], "
        "[%5];" ::"r"(address(destination)),
        "l"(&map), "r"(column), "r"(0), "r"(row / 16), "r"(address(barrier))
        : "memory");
  }

  // Sums that one CTA leaves for another: all of a warpgroup write, then a flag says so.
  __device__ __forceinline__ void store_sums(float* to, const float* four) {
    *reinterpret_cast<float4*>(to) = {four[0], four[1], four[2], four[3]};
  }
  __device__ __forceinline__ void load_sums(const float* from, float* four) {
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"  // from L2: L1 knows nothing of other processors
                 : "=f"(four[0]), "=f"(four[1]), "=f"(four[2]), "=f"(four[3])
                 : "l"(from)
                 : "memory");
  }
  __device__ __forceinline__ void publish(int* flag, int w) {
    __threadfence();
    synchronise(w);
    once([&] { asm volatile("st.release.gpu.global.b32 [%0], 1;" ::"l"(flag) : "memory"); });
  }
  __device__ __forceinline__ void await(const int* flag, int w, [[maybe_unused]] int called) {
    once([&] {
      const auto there = [&] {
        int value;
        asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
        return value != 0;
      };
#ifdef VITLR_BOUNDED_WAITS
      if (!passes_in_time(there, nanoseconds)) give_up(called, 0);
#else
      while (!there()) {
      }
#endif
    });
    synchronise(w);
  }

  // Four numbers of a matrix in fp16 or bf16, zeros where there is none.
  __device__ __forceinline__ float4 four_numbers(const void* matrix, int64_t index, int fp16) {
    if (matrix == nullptr) return {0, 0, 0, 0};
    const uint2 both = __ldg(reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(matrix) + index));
    const float2 low = fp16 ? Numbers<Fp16>::unpack(both.x) : Numbers<Bf16>::unpack(both.x);
    const float2 high = fp16 ? Numbers<Fp16>::unpack(both.y) : Numbers<Bf16>::unpack(both.y);
    return {low.x, low.y, high.x, high.y};
  }
  __device__ __forceinline__ void store_numbers(void* matrix, int64_t index, const float (&four)[4], int fp16) {
    const uint2 both = fp16 ? uint2{Numbers<Fp16>::pack(four[0], four[1]), Numbers<Fp16>::pack(four[2], four[3])}
                            : uint2{Numbers<Bf16>::pack(four[0], four[1]), Numbers<Bf16>::pack(four[2], four[3])};
    *reinterpret_cast<uint2*>(static_cast<uint16_t*>(matrix) + index) = both;
  }

  // Of four neighbouring lanes, to all of them.
  template <int N>
  __device__ __forceinline__ void add_quads(Registers<float, N>& values) {
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
      for (int other = 1; other < 4; other *= 2) values.values[i] += __shfl_xor_sync(~0u, values.values[i], other);
  }
  template <int N>
  __device__ __forceinline__ void most_of_quads(Registers<float, N>& values) {
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
      for (int other = 1; other < 4; other *= 2)
        values.values[i] = fmaxf(values.values[i], __shfl_xor_sync(~0u, values.values[i], other));
  }
};

}  // namespace vitlr::cuda::lowrank
