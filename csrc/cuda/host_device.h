// What a header of kernel logic needs so that nvcc compiles it for the device and g++ for the tests on the host.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define VITLR_HD __host__ __device__ __forceinline__
#else
#define VITLR_HD inline
#endif

namespace vitlr::cuda {

template <class T>
VITLR_HD constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

VITLR_HD double square_root(double x) {
#ifdef __CUDA_ARCH__
  return ::sqrt(x);
#else
  return std::sqrt(x);
#endif
}

}  // namespace vitlr::cuda
