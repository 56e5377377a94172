// The MLP of 8-bit floats for Hopper, emulated: a library that test_cuda_fp8_mlp.py builds and calls with tensors of torch.
#include <cstdio>

#include "cuda/fp8_mlp_body.h"
#include "emulated_fp8.h"

using namespace vitlr::cuda::fp8_mlp;
using Policy = emulated::Fp8Hopper;

// What was breached, empty where nothing was.
extern "C" void emulate(const Matrices* p, const Sizes* sizes, int processors, unsigned seed, char* told, int size) {
  std::string breach = objection(*sizes);
  if (breach.empty())
    with_tile(sizes->r1, sizes->r2, [&](auto tile) {
      using T = decltype(tile);
      const auto encode = [](const void* data, int rows, int pairs, int box_rows) {
        uint16_t* numbers = static_cast<uint16_t*>(const_cast<void*>(data));
        return emulated::Map{numbers, rows, pairs, pairs, box_rows, kPanelColumns, kPanelBytes};
      };
      const auto maps = maps_of<T, emulated::Map>(*p, *sizes, encode, encode);
      breach = emulated::run_roles<T, Policy>(
          ctas<T>(*sizes, processors), 1, seed, [](Policy& policy) { initialise<T>(policy); },
          [&](Policy& policy) { produce<T>(policy, *sizes, maps); },
          [&](Policy& policy) { Consumer<T, Policy>(policy, *sizes).run(); });
    });
  std::snprintf(told, size, "%s", breach.c_str());
}

extern "C" int ctas_of(const Sizes* sizes, int processors) { return room_of(*sizes, processors).ctas; }
extern "C" int room_of_one(const Sizes* sizes) { return room_of(*sizes, 1).each; }
