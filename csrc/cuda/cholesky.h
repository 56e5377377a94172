// Launches of the batched Cholesky factorisation and of substitution by it (cholesky_tiles.h says what they do).
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/cholesky_tiles.h"

namespace vitlr::cuda {

void launch_cholesky(const Cholesky& problem, int device, cudaStream_t stream);
void launch_back_substitution(const BackSubstitution& problem, int device, cudaStream_t stream);

}  // namespace vitlr::cuda
