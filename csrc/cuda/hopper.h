// The policy of lowrank_body.h on the GPU: Hopper's barriers, copies and products as they are in PTX, and nothing else.
// What each rule of the PTX ISA asks for, and where it is met:
//
//   - mbarriers are initialised by one thread, then fence.mbarrier_init, then a barrier of the CTA, and of the
//     cluster where there is one, before anybody arrives (`start`).
//   - A phase completes when no arrival and no byte is outstanding. Full: one arrival with the bytes of the whole
//     box, also where TMA fills a part of it with zeros. st.async may complete bytes before they are expected: the
//     arrival that comes with `expect` still keeps the phase open.
//   - wgmma.fence before the first product of a batch, and after registers that it uses were written
//     (`fence_registers`); commit_group after it; accumulators and register operands are not touched until
//     wait_group says so.
//   - Every warp waits for its own groups, and arrives for itself: a slot has four arrivals a warpgroup.
//   - Shared memory written by st.shared and read by wgmma or TMA: fence.proxy.async by every writer, then a barrier
//     (`keep`, `expand`). The same where ordinary reads are followed by TMA's writes (`exchange`, residual).
//   - Bulk stores: one thread stores, commits and waits (groups belong to a thread); wait_group.read before the
//     memory is written again and before the CTA ends.
//   - setmaxnreg: multiples of 8 within 24..256; the sum of all warpgroups is at most what the CTA was launched
//     with, which is not all of the processor's registers (Tile: an assertion), else consumers wait for ever; it is
//     the first thing of either side of one branch on the warpgroup; all warps of a warpgroup execute it.
//   - Lanes of a warp may see try_wait differently: the branches of its loop are not .uni.
//   - TMA: maps are __grid_constant__ parameters (64-byte aligned), boxes of 64 x 16 bits = 128 bytes (the swizzle's
//     width) by at most 256 rows, destinations multiples of 1024, bases multiples of 16 bytes, strides too.
//   - Distributed shared memory: what peers sent is read after an acquire at cluster scope; no CTA ends before its
//     peers have stopped writing to it (`finish`).
//   - Named barriers 1..3 belong to warpgroups, 4..6 to their turns; 0 is __syncthreads.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/bounded_wait.h"
#include "cuda/lowrank_tile.h"
#include "cuda/tiles.h"
#include "cuda/wgmma.h"

namespace vitlr::cuda::lowrank {

#ifdef VITLR_BOUNDED_WAITS
static __device__ Hang* hang_note;  // the host's memory, as the launch says
static __device__ int somebody_hangs;
#endif

template <class T>
struct Numbers;

template <>
struct Numbers<Bf16> {
  static __device__ __forceinline__ uint32_t pack(float a, float b) {
    const __nv_bfloat162 two = __floats2bfloat162_rn(a, b);
    return reinterpret_cast<const uint32_t&>(two);
  }
  static __device__ __forceinline__ float2 unpack(uint32_t two) {
    return make_float2(__uint_as_float(two << 16), __uint_as_float(two & 0xFFFF0000u));
  }
};

template <>
struct Numbers<Fp16> {
  static __device__ __forceinline__ uint32_t pack(float a, float b) {
    const __half2 two = __floats2half2_rn(a, b);
    return reinterpret_cast<const uint32_t&>(two);
  }
  static __device__ __forceinline__ float2 unpack(uint32_t two) {
    return __half22float2(reinterpret_cast<const __half2&>(two));
  }
};

template <class T>
class Hopper : public Numbers<T> {
 public:
  using Type = T;
  using Map = CUtensorMap;

  // N registers of each thread; the emulation has them for a whole warpgroup, so they are asked for by lane.
  template <class V, int N>
  struct Registers {
    V values[N];
    __device__ __forceinline__ V* operator()(int) { return values; }
  };

  __device__ __forceinline__ explicit Hopper(uint32_t base) : base_(base) {
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank_));
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(ranks_));
  }

  // Who this is. A cluster's CTAs are neighbours in the grid.
  __device__ __forceinline__ int rank() const { return rank_; }
  __device__ __forceinline__ int ranks() const { return ranks_; }
  __device__ __forceinline__ int cluster() const { return blockIdx.x / ranks_; }
  __device__ __forceinline__ int clusters() const { return gridDim.x / ranks_; }
  // The consumer's number, from one lane so that the compiler knows that a warp agrees; the producer comes first.
  __device__ __forceinline__ int warpgroup() const { return __shfl_sync(~0u, threadIdx.x / kWarpgroup, 0) - 1; }
  __device__ __forceinline__ uint32_t address(int offset) const { return base_ + offset; }

  template <class F>
  __device__ __forceinline__ void lanes(F f) {
    int thread;  // read anew, so that addresses made of it are not kept in registers for the whole kernel
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    f(thread % kWarpgroup);
  }
  template <class F>
  __device__ __forceinline__ void once(F f) {
    if (threadIdx.x % kWarpgroup == 0) f();
  }

  // Barriers.
  __device__ __forceinline__ void initialise(int barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(barrier)), "r"(arrivals) : "memory");
  }
  __device__ __forceinline__ void start() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    __syncthreads();
    if (ranks_ > 1) synchronise_cluster();
  }
  __device__ __forceinline__ void finish() {
    if (ranks_ > 1) {
      __syncwarp();  // the producer's lanes come together
      synchronise_cluster();
    }
  }
  __device__ __forceinline__ void expect(int barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(barrier)), "r"(bytes)
                 : "memory");
  }
  __device__ __forceinline__ void arrive_warps(int barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0)
      asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(barrier)) : "memory");
  }
  __device__ __forceinline__ void arrive_at(int rank, int barrier) {
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(remote(rank, barrier))
                 : "memory");
  }
#ifdef VITLR_BOUNDED_WAITS
  static __device__ __forceinline__ uint64_t nanoseconds() {
    uint64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
  }
  // The first to give up leaves the note; a trap of another one must not come before it is written.
  __device__ __forceinline__ void give_up(int barrier, uint32_t parity) const {
    if (atomicExch(&somebody_hangs, 1) == 0) {
      volatile Hang* note = hang_note;
      note->block = blockIdx.x, note->warp = threadIdx.x / 32, note->barrier = barrier, note->parity = parity;
      note->there = 1;
      __threadfence_system();
    } else {
      passes_in_time([] { return false; }, nanoseconds, 50'000'000);
    }
    asm volatile("trap;");
  }
#define VITLR_WAIT(name, instruction)                                                                        \
  __device__ __forceinline__ void name(int barrier, uint32_t parity) {                                       \
    const auto passed = [&] {                                                                                \
      uint32_t answer;                                                                                       \
      asm volatile("{\n.reg .pred p;\n" instruction " p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"              \
                   : "=r"(answer)                                                                            \
                   : "r"(address(barrier)), "r"(parity)                                                      \
                   : "memory");                                                                              \
      return answer != 0;                                                                                    \
    };                                                                                                       \
    if (!passes_in_time(passed, nanoseconds)) give_up(barrier, parity);                                      \
  }
#else
#define VITLR_WAIT(name, instruction)                                       \
  __device__ __forceinline__ void name(int barrier, uint32_t parity) {      \
    asm volatile("{\n.reg .pred p;\nWAIT:\n" instruction                    \
                 " p, [%0], %1;\n@p bra DONE;\nbra WAIT;\nDONE:\n}\n" ::"r"( \
                     address(barrier)),                                     \
                 "r"(parity)                                                \
                 : "memory");                                               \
  }
#endif
  VITLR_WAIT(wait, "mbarrier.try_wait.parity.shared::cta.b64")
  VITLR_WAIT(wait_cluster, "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64")
#undef VITLR_WAIT
  __device__ __forceinline__ void synchronise(int w) {
    asm volatile("bar.sync %0, %1;" ::"r"(1 + w), "n"(kWarpgroup) : "memory");
  }
  __device__ __forceinline__ void wait_turn(int w) {
    asm volatile("bar.sync %0, %1;" ::"r"(4 + w), "n"(2 * kWarpgroup) : "memory");
  }
  __device__ __forceinline__ void pass_turn(int w) {
    asm volatile("bar.arrive %0, %1;" ::"r"(4 + w), "n"(2 * kWarpgroup) : "memory");
  }

  // Copies.
  __device__ __forceinline__ void load(const Map& map, int destination, int barrier, int column, int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            address(destination)),
        "l"(&map), "r"(column), "r"(row), "r"(address(barrier))
        : "memory");
  }
  __device__ __forceinline__ void store(const Map& map, int source, int column, int row) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map), "r"(column),
                 "r"(row), "r"(address(source))
                 : "memory");
  }
  __device__ __forceinline__ void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
  template <int LEFT>
  __device__ __forceinline__ void wait_stores() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(LEFT) : "memory");
  }
  __device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

  __device__ __forceinline__ void store_shared(uint32_t offset, uint32_t value) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(base_ + offset), "r"(value) : "memory");
  }
  __device__ __forceinline__ uint32_t load_shared(uint32_t offset) {
    uint32_t value;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(base_ + offset) : "memory");
    return value;
  }
  __device__ __forceinline__ void load_shared(uint32_t offset, float* four) {
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(four[0]), "=f"(four[1]), "=f"(four[2]), "=f"(four[3])
                 : "r"(base_ + offset)
                 : "memory");
  }
  __device__ __forceinline__ void load_shared(uint32_t offset, uint32_t* two) {
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(two[0]), "=r"(two[1]) : "r"(base_ + offset) : "memory");
  }
  __device__ __forceinline__ void send(int rank, uint32_t offset, int barrier, const float* four) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
            remote(rank, offset)),
        "f"(four[0]), "f"(four[1]), "f"(four[2]), "f"(four[3]), "r"(remote(rank, barrier))
        : "memory");
  }
  __device__ __forceinline__ void send(int rank, uint32_t offset, int barrier, const uint32_t* two) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(
                     remote(rank, offset)),
                 "r"(two[0]), "r"(two[1]), "r"(remote(rank, barrier))
                 : "memory");
  }

  // Two values of a vector in device memory, zeros where there is none.
  static __device__ __forceinline__ float2 pair(const void* vector, int index, bool there) {
    uint32_t two;  // predicated, no branch: it stands in unrolled loops
    asm("{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\nmov.b32 %0, 0;\n@p ld.global.nc.b32 %0, [%1];\n}\n"
        : "=r"(two)
        : "l"(static_cast<const char*>(vector) + 2 * static_cast<int64_t>(index)),
          "r"(static_cast<int>(there && vector != nullptr)));
    return Numbers<T>::unpack(two);
  }

  // Products.
  // The empty statements keep the compiler from moving accumulators while products are under way.
  template <class V, int N>
  __device__ __forceinline__ void pin(Registers<V, N>& registers) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if constexpr (V(0.5f) != 0)
        asm volatile("" : "+f"(registers.values[i])::"memory");
      else
        asm volatile("" : "+r"(registers.values[i])::"memory");
    }
  }
  template <class... Used>
  __device__ __forceinline__ void fence_registers(Used&... used) {
    (pin(used), ...);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  }
  __device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
  template <int LEFT, class... Used>
  __device__ __forceinline__ void wait_products(Used&... used) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
    (pin(used), ...);
  }
  // sums = A Bᵀ where SET, else sums += A Bᵀ.
  template <int N, bool SET = false>
  __device__ __forceinline__ void multiply(Registers<float, N / 2>& sums, uint64_t A, uint64_t B) {
    if constexpr (SET)
      Wgmma<N, T>::set_shared(sums.values, A, B);
    else
      Wgmma<N, T>::shared(sums.values, A, B);
  }
  // The same with four registers of A from `first` on.
  template <int N, bool SET = false, int COUNT>
  __device__ __forceinline__ void multiply_registers(Registers<float, N / 2>& sums, Registers<uint32_t, COUNT>& A,
                                                     int first, uint64_t B) {
    const uint32_t* a = A.values + first;
    if constexpr (SET)
      Wgmma<N, T>::set_registers(sums.values, a[0], a[1], a[2], a[3], B);
    else
      Wgmma<N, T>::registers(sums.values, a[0], a[1], a[2], a[3], B);
  }

 private:
  __device__ __forceinline__ uint32_t remote(int rank, int offset) const {
    uint32_t found;
    // Volatile, so that it is not hoisted: many addresses at once would spill.
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(found) : "r"(address(offset)), "r"(rank));
    return found;
  }
  __device__ __forceinline__ void synchronise_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
  }

  uint32_t base_;
  int rank_, ranks_;
};

}  // namespace vitlr::cuda::lowrank
