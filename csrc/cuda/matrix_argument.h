// How a batch of fp64 matrices comes from Python: (address, stride of the batch, of rows, of columns), in elements.
#pragma once

#include <pybind11/pybind11.h>

#include "cuda/chain_product.h"

namespace vitlr::cuda {

inline Matrix matrix_of(const pybind11::tuple& fields) {
  return {reinterpret_cast<double*>(fields[0].cast<uintptr_t>()), fields[1].cast<int64_t>(), fields[2].cast<int64_t>(),
          fields[3].cast<int64_t>()};
}

}  // namespace vitlr::cuda
