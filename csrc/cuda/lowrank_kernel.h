// The kernel around lowrank_body.h: one branch between producer and consumers, and its launch.
#pragma once
#include "cuda/hang.h"
#include "cuda/hopper.h"
#include "cuda/lowrank_body.h"
#include "cuda/lowrank_sm90.h"
#include "cuda/status.h"

namespace vitlr::cuda::lowrank {

// 1024: panels lie at multiples of that, and what a launch is given may not.
__device__ __forceinline__ uint32_t aligned_shared() {
  extern __shared__ unsigned char shared[];
  return (static_cast<uint32_t>(__cvta_generic_to_shared(shared)) + 1023) & ~1023u;
}

template <int REGISTERS>
__device__ __forceinline__ void fewer_registers() {
  if constexpr (REGISTERS > 0) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
__device__ __forceinline__ void more_registers() {
  if constexpr (REGISTERS > 0) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <class T, bool MLP, class Type>
__global__ void __launch_bounds__(T::threads, 1)
    lowrank_kernel(const __grid_constant__ Maps<CUtensorMap> maps, const __grid_constant__ Sizes sizes) {
  Hopper<Type> p(aligned_shared());
  if (threadIdx.x == 0) initialise<T>(p);
  p.start();
  if (threadIdx.x < kWarpgroup) {
    fewer_registers<T::producer_registers>();
    if (threadIdx.x == 0) produce<T, MLP>(p, sizes, maps);
  } else {
    more_registers<T::consumer_registers>();
    Consumer<T, MLP, Hopper<Type>>(p, sizes, maps).run();
  }
  p.finish();
}

// `clusters` of `ranks` CTAs, one CTA a processor.
template <class T, bool MLP, class Type>
void launch(const Maps<CUtensorMap>& maps, const Sizes& sizes, const Plan& plan, cudaStream_t stream) {
  auto* kernel = &lowrank_kernel<T, MLP, Type>;
  const size_t bytes = T::shared_bytes + 1024;
  allow_shared(kernel, bytes, "shared memory of a low-rank kernel");
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(plan.ranks);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(plan.clusters * plan.ranks));
  config.blockDim = dim3(T::threads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
#ifdef VITLR_BOUNDED_WAITS
  Hang* const note = allocated_hang();
  check(cudaMemcpyToSymbol(hang_note, &note, sizeof note), "the note of the debug build");
#endif
  check(cudaLaunchKernelEx(&config, kernel, maps, sizes), "launch of a low-rank kernel");
}

inline void check_encoded(CUresult answer, int rows, int columns, int64_t stride) {
  if (answer == CUDA_SUCCESS) return;
  throw std::runtime_error("cuTensorMapEncodeTiled: status " + std::to_string(answer) + " for a matrix of " +
                           std::to_string(rows) + " x " + std::to_string(columns) + ", rows " + std::to_string(stride) +
                           " apart; VITLR_BACKEND=torch does without this kernel");
}

// A tensor map: rows of 16-bit values, a box whose width is that of its swizzle. Host work alone: a graph keeps the
// map.
inline CUtensorMap encoded(const Matrix& matrix, int rows, int columns, int box_rows, int box_columns, bool fp16) {
  static auto* const encode = driver_call<decltype(cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  CUtensorMap map;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(matrix.stride) * 2};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t every[2] = {1, 1};
  const CUresult answer = encode(
      &map, fp16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2,
      const_cast<void*>(matrix.data), sizes, strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
      box_columns == kPanelColumns ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check_encoded(answer, rows, columns, matrix.stride);
  return map;
}

// The same of contiguous rows in boxes of 64 values, whose rows come in the order of `woven` (tiles.h): one of two rows, of
// four pairs four apart, of two two apart, and sixteens.
inline CUtensorMap woven_map(const void* data, int rows, int columns, int box_rows) {
  static auto* const encode = driver_call<decltype(cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  CUtensorMap map;
  const cuuint64_t row_bytes = static_cast<cuuint64_t>(columns) * 2;
  const cuuint64_t sizes[5] = {static_cast<cuuint64_t>(columns), 2, 4, 2, static_cast<cuuint64_t>(rows / 16)};
  const cuuint64_t strides[4] = {row_bytes, 4 * row_bytes, 2 * row_bytes, 16 * row_bytes};
  const cuuint32_t box[5] = {kPanelColumns, 2, 4, 2, static_cast<cuuint32_t>(box_rows / 16)};
  const cuuint32_t every[5] = {1, 1, 1, 1, 1};
  const CUresult answer = encode(&map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 5, const_cast<void*>(data), sizes, strides, box,
                                 every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check_encoded(answer, rows, columns, columns);
  return map;
}

template <bool MLP, class Type>
void launch(const LowrankParams& p, const Plan& plan, cudaStream_t stream) {
  bool found = false;
  each_tile<MLP>([&](auto tile) {
    using T = decltype(tile);
    if (T::R != plan.R || T::WARPGROUPS != plan.warpgroups) return;
    found = true;
    const auto encode = [&](const Matrix& matrix, int rows, int columns, int box_rows, int box_columns) {
      return encoded(matrix, rows, columns, box_rows, box_columns, p.fp16);
    };
    const auto maps = maps_of<T, CUtensorMap>(p, encode);
    launch<T, MLP, Type>(maps, sizes_of(p, plan), plan, stream);
  });
  if (!found) refuse("no tile of rank " + std::to_string(plan.R) + ", warpgroups " + std::to_string(plan.warpgroups));
}

}  // namespace vitlr::cuda::lowrank
