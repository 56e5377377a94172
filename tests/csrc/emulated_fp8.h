// The policy of csrc/cuda/fp8_body.h and fp8_mlp_body.h on the host: emulated_hopper.h with products of bytes, numbers in
// pairs, and what CTAs leave for each other.
#pragma once
#include "emulated_hopper.h"

namespace emulated {

struct Halves {
  _Float16 x, y;
};
struct Four {
  float x, y, z, w;
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
  static Four four_floats(const float* vector, int index, bool there) {
    if (!there) return {0, 0, 0, 0};
    return {vector[index], vector[index + 1], vector[index + 2], vector[index + 3]};
  }

  void store_pair(uint32_t offset, uint16_t value) { store_bytes(offset, &value, 2); }
  template <int N>
  void multiply_bytes(Registers<float, N / 2>& sums, uint64_t A, uint64_t B, bool add) {
    multiply_shared<N>(sums, A, B, !add);
  }
  template <int N, bool SET = false>
  void multiply_bytes(Registers<float, N / 2>& sums, uint64_t A, uint64_t B) {
    multiply_shared<N>(sums, A, B, SET);
  }
  template <int N, bool SET = false, int COUNT>
  void multiply_operand(Registers<float, N / 2>& sums, Registers<uint32_t, COUNT>& A, int first, uint64_t B) {
    if (first % 4 || first + 4 > COUNT) throw std::runtime_error("no such operand registers");
    enqueue<N>(sums, B, SET, [=, &A](Left& a) {
      for (int lane = 0; lane < 128; ++lane)
        for (int i = 0; i < 4; ++i) {
          // Figure "WGMMA .m64nNk32 register fragment layout for matrix A" of the PTX ISA.
          const int row = lane / 32 * 16 + lane % 32 / 4 + (i % 2 ? 8 : 0), k = lane % 4 * 4 + (i < 2 ? 0 : 16);
          for (int byte = 0; byte < 4; ++byte)
            a[row][k + byte] = decode(static_cast<uint8_t>(A.values[lane][first + i] >> 8 * byte), E4m3{});
        }
    });
  }

  // A matrix of five dimensions to TMA: (columns, 2 rows, 4 four apart, 2 two apart, sixteens), the first one fastest.
  void load_woven(const Map& map, int destination, int barrier, int column, int row) {
    if (map.rows % 16 || row % 16 || map.box_rows % 16) breach("rows are woven by sixteens");
    load_rows(map, destination, barrier, column, [row](int r) {
      const int one = r % 2, four = r / 2 % 4, two = r / 8 % 2, sixteen = r / 16;
      return row + one + 4 * four + 2 * two + 16 * sixteen;
    });
  }

  void store_sums(float* to, const float* four) {
    for (int i = 0; i < 4; ++i) {
      if (to[i] == to[i]) breach("sums are left twice");  // they were NaN
      to[i] = four[i];
    }
  }
  void load_sums(const float* from, float* four) {
    for (int i = 0; i < 4; ++i) four[i] = from[i];
  }
  void publish(int* flag, int) {
    if (*flag != 0) breach("a flag was set before");
    *flag = 1;
  }
  // CTAs run one after the other, so what is waited for has to be there.
  void await(const int* flag, int, int) {
    if (*flag == 0) throw std::runtime_error("a CTA waits for one that was started after it");
  }

  static Four four_numbers(const void* matrix, int64_t index, int fp16) {
    if (matrix == nullptr) return {0, 0, 0, 0};
    const uint16_t* v = static_cast<const uint16_t*>(matrix) + index;
    const auto one = [&](int i) { return fp16 ? decode(v[i], Fp16{}) : decode(v[i], Bf16{}); };
    return {one(0), one(1), one(2), one(3)};
  }
  void store_numbers(void* matrix, int64_t index, const float (&four)[4], int fp16) {
    uint16_t* v = static_cast<uint16_t*>(matrix) + index;
    for (int i = 0; i < 4; ++i) {
      const float before = fp16 ? decode(v[i], Fp16{}) : decode(v[i], Bf16{});
      if (before == before) breach("an output is written twice");  // it was NaN
      v[i] = fp16 ? encode(four[i], Fp16{}) : encode(four[i], Bf16{});
    }
  }

  template <int N>
  void most_of_quads(Registers<float, N>& values) {
    for (int lane = 0; lane < 128; lane += 4)
      for (int i = 0; i < N; ++i) {
        float most = values(lane)[i];
        for (int other = 1; other < 4; ++other) most = std::fmax(most, values(lane + other)[i]);
        for (int other = 0; other < 4; ++other) values(lane + other)[i] = most;
      }
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
