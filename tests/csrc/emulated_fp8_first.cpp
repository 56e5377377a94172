// The first linear of 8-bit floats for Hopper, emulated: a library that test_cuda_fp8_first.py builds and calls with
// tensors of torch.
#include <cstdio>

#include "cuda/fp8_first_body.h"
#include "emulated_fp8.h"

using namespace vitlr::cuda::fp8_first;
using Policy = emulated::Fp8Hopper;

template <class T, class Type>
std::string emulated_run(const Matrices& p, const Sizes& sizes, int processors, unsigned seed) {
  const auto encode = [](const void* data, int rows, int pairs, int box_rows, int box_pairs) {
    uint16_t* numbers = static_cast<uint16_t*>(const_cast<void*>(data));
    return emulated::Map{numbers, rows, pairs, pairs, box_rows, box_pairs, box_pairs * 2};
  };
  const auto maps = maps_of<T, emulated::Map>(p, sizes, encode);
  return emulated::run_roles<T, Policy>(
      ctas<T>(sizes, processors), 1, seed, [](Policy& policy) { initialise<T>(policy); },
      [&](Policy& policy) { produce<T>(policy, sizes, maps); },
      [&](Policy& policy) { Consumer<T, Type, Policy>(policy, sizes, maps, policy.warpgroup()).run(); });
}

// What was breached, empty where nothing was.
extern "C" void emulate(const Matrices* p, const Sizes* sizes, int processors, unsigned seed, char* told, int size) {
  std::string breach = objection(*sizes);
  if (breach.empty())
    with_tile(sizes->r, [&](auto tile) {
      using T = decltype(tile);
      breach = sizes->fp16 ? emulated_run<T, emulated::Fp16>(*p, *sizes, processors, seed)
                           : emulated_run<T, emulated::Bf16>(*p, *sizes, processors, seed);
    });
  std::snprintf(told, size, "%s", breach.c_str());
}
