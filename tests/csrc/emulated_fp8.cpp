// The linear of 8-bit floats for Hopper, emulated: a library that test_cuda_fp8.py builds and calls with tensors of torch.
#include <cstdio>

#include "cuda/fp8_body.h"
#include "emulated_fp8.h"

using namespace vitlr::cuda::fp8;
using Policy = emulated::Fp8Hopper;

// What was breached, empty where nothing was.
extern "C" void emulate(const Matrices* p, const Sizes* sizes, int ctas, unsigned seed, char* told, int size) {
  std::string breach = objection(*sizes);
  if (breach.empty())
    with_tile(sizes->K, [&](auto tile) {
      using T = decltype(tile);
      const auto encode = [](const void* data, int rows, int pairs, int box_rows, int box_pairs) {
        uint16_t* numbers = static_cast<uint16_t*>(const_cast<void*>(data));
        return emulated::Map{numbers, rows, pairs, pairs, box_rows, box_pairs, box_pairs * 2};
      };
      const auto maps = maps_of<T, emulated::Map>(*p, *sizes, encode);
      breach = emulated::run_roles<T, Policy>(
          ctas, 1, seed, [](Policy& policy) { vitlr::cuda::fp8::initialise<T>(policy); },
          [&](Policy& policy) { produce<T>(policy, *sizes, maps); },
          [&](Policy& policy) { Consumer<T, Policy>(policy, *sizes, maps).run(); });
    });
  std::snprintf(told, size, "%s", breach.c_str());
}

// y[i] = GELU of p[i] as bytes over a row's scale s, and the row's sum of squares, 32 values a time.
extern "C" float gelu_bytes(float s, const float* p, uint16_t* y, int pairs) {
  float total = 0;
  for (int first = 0; first < pairs; first += 16) {
    Bytes<Act::gelu, Policy> to(s, 1 / s);
    for (int i = first; i < pairs && i < first + 16; ++i) y[i] = to.made(p[2 * i], p[2 * i + 1]);
    total += to.squares();
  }
  return total;
}

// Bytes to and from floats as the emulation has them, which the GPU's instructions are taken to be.
extern "C" void bytes_of(const float* x, uint8_t* y, int count) {
  for (int i = 0; i < count; ++i) y[i] = emulated::encode(x[i], emulated::E4m3{});
}
extern "C" void floats_of(const uint8_t* x, float* y, int count) {
  for (int i = 0; i < count; ++i) y[i] = emulated::decode(x[i], emulated::E4m3{});
}
