// How the kernels of 8-bit floats for Hopper are launched: maps of their matrices, a CTA's threads and shared memory.
#pragma once
#include "cuda/lowrank_kernel.h"

namespace vitlr::cuda::fp8 {

// TMA moves bytes as 16-bit numbers: the map of a matrix [rows, pairs].
inline CUtensorMap encoded_pairs(const void* data, int rows, int pairs, int box_rows, int box_pairs) {
  return lowrank::encoded(lowrank::Matrix{data, pairs}, rows, pairs, box_rows, box_pairs, true);
}

// kernel(arguments...) with the threads and the shared memory of T, in so many CTAs.
template <class T, class... Arguments>
void launch(void (*kernel)(Arguments...), int ctas, cudaStream_t stream, const char* name, const Arguments&... arguments) {
  const size_t bytes = T::shared_bytes + 1024;
  allow_shared(kernel, bytes, name);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(ctas));
  config.blockDim = dim3(T::threads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
#ifdef VITLR_BOUNDED_WAITS
  lowrank::Hang* const note = lowrank::allocated_hang();
  check(cudaMemcpyToSymbol(lowrank::hang_note, &note, sizeof note), "the note of the debug build");
#endif
  check(cudaLaunchKernelEx(&config, kernel, arguments...), name);
}

}  // namespace vitlr::cuda::fp8
