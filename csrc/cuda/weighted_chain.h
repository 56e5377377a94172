// Launch of batched products in fp64 (chain_product.h says what they are).
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/chain_product.h"

namespace vitlr::cuda {

void launch_weighted_chain(const Product& product, int device, cudaStream_t stream);

}  // namespace vitlr::cuda
