// The policy of csrc/cuda/fp8_body.h on the host: emulated_hopper.h with products of bytes, and numbers in pairs.
#pragma once
#include "emulated_hopper.h"

namespace emulated {

struct Halves {
  _Float16 x, y;
};

class Fp8Hopper : public Hopper<E4m3> {
 public:
  using Hopper<E4m3>::Hopper;
  using Halves = emulated::Halves;

  static Halves halves(float a, float b) { return {static_cast<_Float16>(a), static_cast<_Float16>(b)}; }
  static Halves both(float a) { return halves(a, a); }
  static Pair floats(Halves a) { return {static_cast<float>(a.x), static_cast<float>(a.y)}; }
  static Halves absolute(Halves a) {
    return each([](float x) { return std::fabs(x); }, a);
  }
  static Halves negative(Halves a) {
    return each([](float x) { return -x; }, a);
  }
  static Halves exp2(Halves a) {
    return each([](float x) { return std::exp2(x); }, a);
  }
  static Halves least(Halves a, Halves b) {
    return each([](float x, float y) { return std::fmin(x, y); }, a, b);
  }
  static Halves most(Halves a, Halves b) {
    return each([](float x, float y) { return std::fmax(x, y); }, a, b);
  }
  static Halves product(Halves a, Halves b) {
    return each([](float x, float y) { return x * y; }, a, b);
  }
  static Halves fma(Halves a, Halves b, Halves c) {
    return each([](double x, double y, double z) { return x * y + z; }, a, b, c);  // rounded once
  }
  static float square_root(float a) { return std::sqrt(a); }
  static uint16_t bytes(float a, float b) { return encode(a, E4m3{}) | encode(b, E4m3{}) << 8; }
  static uint16_t bytes(Halves a) { return bytes(static_cast<float>(a.x), static_cast<float>(a.y)); }
  static Pair pair_of_floats(const float* vector, int index, bool there) {
    return there ? Pair{vector[index], vector[index + 1]} : Pair{0, 0};
  }

  void store_pair(uint32_t offset, uint16_t value) { store_bytes(offset, &value, 2); }
  template <int N>
  void multiply_bytes(Registers<float, N / 2>& sums, uint64_t A, uint64_t B, bool add) {
    multiply_shared<N>(sums, A, B, !add);
  }
  template <int N>
  void add_quads(Registers<float, N>& values) {
    for (int lane = 0; lane < 128; lane += 4)
      for (int i = 0; i < N; ++i) {
        float sum = 0;
        for (int other = 0; other < 4; ++other) sum += values(lane + other)[i];
        for (int other = 0; other < 4; ++other) values(lane + other)[i] = sum;
      }
  }

 private:
  template <class F, class... A>
  static Halves each(F f, A... a) {
    return {static_cast<_Float16>(f(a.x...)), static_cast<_Float16>(f(a.y...))};
  }
};

}  // namespace emulated
