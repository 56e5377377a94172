// One block's share of a product in fp64 on tensor cores: operands through a ring in shared memory, sums in registers.
//
// The algorithm is written once, over a `Block`: on the GPU that is the block of threads itself (DeviceBlock), in
// tests/csrc a loop over its threads, one phase between barriers after the other, which may also delay every copy until
// it is waited for. `block.each(f)` calls f(thread); `PerThread<V>` is a register, or an array of one for each thread.
#pragma once

#include "cuda/host_device.h"

namespace vitlr::cuda {

// BM x BN of the result by warps of WM x WN each, BK deep, STAGES tiles of both operands in flight.
template <int BM_, int BN_, int WM_, int WN_>
struct Tiles {
  static constexpr int BM = BM_, BN = BN_, WM = WM_, WN = WN_, BK = 16, STAGES = 3;
  static constexpr int PAD = 4;  // strides of 4 modulo 16 doubles: a fragment's 32 loads meet no bank twice in a half-warp
  static constexpr int WARPS_N = BN / WN, WARPS = BM / WM * WARPS_N, THREADS = 32 * WARPS;
  static constexpr int MI = WM / 16, NI = WN / 8;
  static constexpr int X_SIZE = BM * (BK + PAD), Y_SIZE = BN * (BK + PAD);
  static constexpr int SHARED = STAGES * (X_SIZE + Y_SIZE);  // doubles
  static_assert(X_SIZE >= BK * (BM + PAD) && Y_SIZE >= BK * (BN + PAD), "either layout fits");
};
using Wide = Tiles<128, 128, 64, 32>;
using Narrow = Tiles<64, 64, 32, 32>;

template <class T>
struct Accumulator {
  double c[T::MI][T::NI][4];
};

// One step of 8 along the depth.
template <class T>
struct Fragments {
  double a[T::MI][4], b[T::NI][2];
};

// Where entry e of the accumulator [mi][ni] of a thread lies in the tile: as the PTX ISA says for mma.m16n8k8 in fp64.
template <class T>
VITLR_HD int row_of(int thread, int mi, int e) {
  return thread / 32 / T::WARPS_N * T::WM + mi * 16 + thread % 32 / 4 + e / 2 * 8;
}
template <class T>
VITLR_HD int column_of(int thread, int ni, int e) {
  return thread / 32 % T::WARPS_N * T::WN + ni * 8 + thread % 4 * 2 + e % 2;
}

// An operand tile in shared memory: entry (row, k) at `at[row * row_stride + k * depth_stride]`.
struct Staged {
  double* at;
  int row_stride, depth_stride;
};

template <class T>
VITLR_HD Fragments<T> fragments(int thread, const Staged& x, const Staged& y, int k) {
  Fragments<T> f;
  const int group = thread % 32 / 4, depth = k + thread % 4;
  const int row = thread / 32 / T::WARPS_N * T::WM + group, column = thread / 32 % T::WARPS_N * T::WN + group;
#pragma unroll
  for (int mi = 0; mi < T::MI; ++mi)
#pragma unroll
    for (int e = 0; e < 4; ++e)  // rows group and group + 8, depths t and t + 4
      f.a[mi][e] = x.at[(row + mi * 16 + e % 2 * 8) * x.row_stride + (depth + e / 2 * 4) * x.depth_stride];
#pragma unroll
  for (int ni = 0; ni < T::NI; ++ni)
#pragma unroll
    for (int e = 0; e < 2; ++e) f.b[ni][e] = y.at[(column + ni * 8) * y.row_stride + (depth + e * 4) * y.depth_stride];
  return f;
}

// A block's rows of an operand in device memory: entry (row, k) at `at[row * row_stride + k * depth_stride]`, `rows` of
// them there, the others taken as zero. Strides may be negative.
struct Operand {
  const double* at;
  int64_t row_stride, depth_stride;
  int64_t rows;
};

// Threads walk, and shared memory holds, the operand along its contiguous direction.
VITLR_HD bool along_depth(const Operand& operand) { return operand.row_stride != 1 && operand.row_stride != -1; }

template <int ROWS, int BK, int PAD>
VITLR_HD Staged staged(double* at, bool depth_first) {
  return depth_first ? Staged{at, BK + PAD, 1} : Staged{at, 1, ROWS + PAD};
}

// Start the copies of ROWS x BK of an operand from depth k on; what lies beyond `last` is zero. A thread keeps to one row or
// one depth and walks by constant strides, so an element costs a handful of instructions.
template <int ROWS, int BK, int THREADS, class Block>
VITLR_HD void fetch(Block& block, int thread, const Operand& from, const Staged& to, int64_t k, int64_t last, bool deep) {
  static_assert(THREADS % BK == 0 && THREADS % ROWS == 0 && ROWS * BK % THREADS == 0, "whole walks");
  int row = deep ? thread / BK : thread % ROWS, depth = deep ? thread % BK : thread / ROWS;
  const int rows = deep ? THREADS / BK : 0, depths = deep ? 0 : THREADS / ROWS;
  const int64_t there = last - k;
  const double* source = from.at + row * from.row_stride + (k + depth) * from.depth_stride;
  const int64_t stride = rows * from.row_stride + depths * from.depth_stride;
  double* target = to.at + row * to.row_stride + depth * to.depth_stride;
  const int target_stride = rows * to.row_stride + depths * to.depth_stride;
#pragma unroll
  for (int e = 0; e < ROWS * BK / THREADS; ++e) {
    const bool inside = row < from.rows && depth < there;
    block.copy(thread, target, inside ? source : from.at, inside);
    row += rows, depth += depths, source += stride, target += target_stride;
  }
}

// acc += x yᵀ of tiles that lie in shared memory, DEPTH deep.
template <class T, int DEPTH, class Block, class Sums>
VITLR_HD void contract(Block& block, const Staged& x, const Staged& y, Sums& acc) {
#pragma unroll 1
  for (int k = 0; k < DEPTH; k += 8) {
    typename Block::template PerThread<Fragments<T>> f;
    block.each([&](int thread) { f[thread] = fragments<T>(thread, x, y, k); });
    block.template mma<T>(acc, f);
  }
}

// acc += X[:, first:last] Y[:, first:last]ᵀ, both as rows of the block's tile by depth. `shared`: T::SHARED doubles, free
// again afterwards. Tile s of the ring is overwritten only after the barrier behind its last use.
template <class T, class Block, class Sums>
VITLR_HD void multiply(Block& block, const Operand& X, const Operand& Y, int64_t first, int64_t last, double* shared,
                       Sums& acc) {
  const bool x_deep = along_depth(X), y_deep = along_depth(Y);
  const int64_t steps = last > first ? ceil_div<int64_t>(last - first, T::BK) : 0;
  const auto x_at = [&](int64_t step) {
    return staged<T::BM, T::BK, T::PAD>(shared + step % T::STAGES * (T::X_SIZE + T::Y_SIZE), x_deep);
  };
  const auto y_at = [&](int64_t step) {
    return staged<T::BN, T::BK, T::PAD>(shared + step % T::STAGES * (T::X_SIZE + T::Y_SIZE) + T::X_SIZE, y_deep);
  };
  const auto start = [&](int thread, int64_t step) {
    if (step < steps) {
      fetch<T::BM, T::BK, T::THREADS>(block, thread, X, x_at(step), first + step * T::BK, last, x_deep);
      fetch<T::BN, T::BK, T::THREADS>(block, thread, Y, y_at(step), first + step * T::BK, last, y_deep);
    }
    block.commit(thread);  // empty groups too, so that the count of those to wait for stays the same
  };
  block.each([&](int thread) {
    for (int step = 0; step < T::STAGES - 1; ++step) start(thread, step);
  });
  for (int64_t step = 0; step < steps; ++step) {
    block.each([&](int thread) { block.template wait<T::STAGES - 2>(thread); });
    block.sync();
    block.each([&](int thread) { start(thread, step + T::STAGES - 1); });
    contract<T, T::BK>(block, x_at(step), y_at(step), acc);
  }
  block.each([&](int thread) { block.template wait<0>(thread); });
  block.sync();
}

template <class T, class Block, class Sums>
VITLR_HD void clear(Block& block, Sums& acc) {
  block.each([&](int thread) {
#pragma unroll
    for (int mi = 0; mi < T::MI; ++mi)
#pragma unroll
      for (int ni = 0; ni < T::NI; ++ni)
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[thread].c[mi][ni][e] = 0;
  });
}

// f(row, column, sum) for every entry of a thread's part of the tile.
template <class T, class F>
VITLR_HD void for_each(int thread, const Accumulator<T>& acc, F f) {
#pragma unroll
  for (int mi = 0; mi < T::MI; ++mi)
#pragma unroll
    for (int ni = 0; ni < T::NI; ++ni)
#pragma unroll
      for (int e = 0; e < 4; ++e) f(row_of<T>(thread, mi, e), column_of<T>(thread, ni, e), acc.c[mi][ni][e]);
}

// The block of threads of a kernel.
struct DeviceBlock {
  template <class V>
  struct PerThread {
    V value;
    VITLR_HD V& operator[](int) { return value; }
  };
#ifdef __CUDA_ARCH__
  template <class F>
  __device__ __forceinline__ void each(F f) {
    f(static_cast<int>(threadIdx.x));
  }
  __device__ __forceinline__ void sync() { __syncthreads(); }
  __device__ __forceinline__ void copy(int, double* to, const double* from, bool inside) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    const int bytes = inside ? 8 : 0;  // the rest of the eight becomes zero
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
  }
  __device__ __forceinline__ void commit(int) { asm volatile("cp.async.commit_group;" ::: "memory"); }
  template <int N>
  __device__ __forceinline__ void wait(int) {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
  }
  template <class T>
  __device__ __forceinline__ void mma(PerThread<Accumulator<T>>& acc, const PerThread<Fragments<T>>& f) {
#pragma unroll
    for (int mi = 0; mi < T::MI; ++mi)
#pragma unroll
      for (int ni = 0; ni < T::NI; ++ni) mma_16x8x8(acc.value.c[mi][ni], f.value.a[mi], f.value.b[ni]);
  }

 private:
  __device__ __forceinline__ static void mma_16x8x8(double (&c)[4], const double (&a)[4], const double (&b)[2]) {
#if __CUDA_ARCH__ >= 900
    asm("mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+d"(c[0]), "+d"(c[1]), "+d"(c[2]), "+d"(c[3])
        : "d"(a[0]), "d"(a[1]), "d"(a[2]), "d"(a[3]), "d"(b[0]), "d"(b[1]));
#else
#pragma unroll
    for (int k = 0; k < 2; ++k)
#pragma unroll
      for (int m = 0; m < 2; ++m)
        asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
            : "+d"(c[2 * m]), "+d"(c[2 * m + 1])
            : "d"(a[2 * k + m]), "d"(b[k]));
#endif
  }
#endif
};

}  // namespace vitlr::cuda
