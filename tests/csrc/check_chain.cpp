// Calls the kernels of chains over ragged shapes and compares them with naive loops; buffers are exactly as large as
// what lies in them, so that AddressSanitizer sees a read or write beside them. Built and run by test_sanitizers.py.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/chain.h"
#include "ragged.h"

using namespace vitlr;

namespace {

// Values that bf16 holds, in a heap buffer of their own in the dtype of the kernel.
struct Values {
  Values(int64_t count, bool bf16) : numbers(count), size(bf16 ? 2 : 4), memory(new char[count * size]) {
    std::uniform_int_distribution<int> level(-8, 8);
    for (int64_t i = 0; i < count; ++i) {
      numbers[i] = static_cast<float>(level(generator)) / 8;
      uint32_t bits;
      std::memcpy(&bits, &numbers[i], 4);
      const uint16_t half = static_cast<uint16_t>(bits >> 16);
      std::memcpy(memory.get() + i * size, bf16 ? static_cast<const void*>(&half) : &bits, size);
    }
  }
  std::vector<float> numbers;
  int64_t size;
  std::unique_ptr<char[]> memory;
};

float number(const char* memory, int64_t i, bool bf16) {
  uint32_t bits = 0;
  if (bf16) {
    uint16_t half;
    std::memcpy(&half, memory + 2 * i, 2);
    bits = static_cast<uint32_t>(half) << 16;
  } else {
    std::memcpy(&bits, memory + 4 * i, 4);
  }
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// y = relu(x Bᵀ) (A)ᵀ + x Rᵀ + bias + residual, R from codes where `form` is one.
bool check(const ChainKernel& kernel, bool bf16, Form form, int threads) {
  const int64_t M = pick({0, 1, 2, 7, 13, 25, 64, 197}), K = pick({1, 2, 15, 31, 64, 129, 258, 300});
  const int64_t r = pick({1, 3, 16, 17, 33, 64}), N = pick({1, 7, 16, 31, 32, 47, 65, 96}), group = pick({1, 2, 5, 32, 400});
  const int64_t groups = (K + group - 1) / group, row_codes = form == kInt4 ? (K + 1) / 2 : K;
  const Values x(M * K, bf16), B(r * K, bf16), A(N * r, bf16), bias(N, bf16), residual(M * N, bf16), scales(N * groups, bf16);
  std::unique_ptr<uint8_t[]> codes(new uint8_t[N * row_codes]);
  for (int64_t i = 0; i < N * row_codes; ++i) codes[i] = static_cast<uint8_t>(generator());

  const auto room = [&](int64_t n, int64_t k, Form f) {
    return std::unique_ptr<char[]>(new char[kernel.packed_bytes(n, k, f)]);
  };
  const auto packed_B = room(r, K, kPlain), packed_A = room(N, r, kPlain), packed_R = room(N, K, form);
  std::unique_ptr<float[]> packed_scales(new float[kernel.packed_bytes(N, 1, kInt8) * groups]);
  kernel.pack(B.memory.get(), K, 1, r, K, packed_B.get());
  kernel.pack(A.memory.get(), r, 1, N, r, packed_A.get());
  if (form != kPlain)
    kernel.pack_codes(codes.get(), scales.memory.get(), N, K, group, form, packed_R.get(), packed_scales.get());
  const Weight R{packed_R.get(), packed_scales.get(), N, K, group, form};
  const Layer layers[2] = {{{packed_B.get(), nullptr, r, K, 1, kPlain}, nullptr, nullptr, kRelu},
                           {{packed_A.get(), nullptr, N, r, 1, kPlain}, form == kPlain ? nullptr : &R, bias.memory.get(), kNone}};
  std::unique_ptr<char[]> y(new char[M * N * kernel.bytes]);
  run_chain(kernel, {x.memory.get(), M, K, K, 1, y.get(), residual.memory.get(), N}, layers, 2, threads);

  const auto in_dtype = [&](double value) {
    float narrow = static_cast<float>(value);
    if (!bf16) return narrow;
    uint32_t bits;
    std::memcpy(&bits, &narrow, 4);
    bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
    std::memcpy(&narrow, &bits, 4);
    return narrow;
  };
  for (int64_t m = 0; m < M; ++m) {
    std::vector<double> t(r);
    for (int64_t j = 0; j < r; ++j) {
      for (int64_t k = 0; k < K; ++k) t[j] += double(x.numbers[m * K + k]) * B.numbers[j * K + k];
      t[j] = t[j] > 0 ? t[j] : 0;
    }
    for (int64_t n = 0; n < N; ++n) {
      double expected = bias.numbers[n] + residual.numbers[m * N + n], magnitude = std::fabs(expected);
      for (int64_t j = 0; j < r; ++j) {
        const double product = t[j] * A.numbers[n * r + j];
        expected += product, magnitude += std::fabs(product);
      }
      for (int64_t k = 0; k < K && form != kPlain; ++k) {
        const uint8_t byte = codes[n * row_codes + (form == kInt4 ? k / 2 : k)];
        const int code = form == kInt8 ? static_cast<int8_t>(byte) : (byte >> (k % 2 * 4) & 15) - 8;
        const double product = x.numbers[m * K + k] * in_dtype(code * scales.numbers[n * groups + k / group]);
        expected += product, magnitude += std::fabs(product);
      }
      const double allowed = magnitude * (bf16 ? 1.0 / 100 : 1e-6) + 1e-6;
      const float got = number(y.get(), m * N + n, bf16);
      if (!(std::fabs(got - expected) <= allowed)) {
        std::printf("%s %s form %d M=%ld K=%ld N=%ld r=%ld group=%ld: y[%ld, %ld] = %g, expected %g\n", kernel.name,
                    bf16 ? "bf16" : "fp32", form, long(M), long(K), long(N), long(r), long(group), long(m), long(n), got,
                    expected);
        return false;
      }
    }
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  return check_all(argc, argv, [](Isa isa, bool bf16, int round) {
    for (Form form : {kPlain, kInt8, kInt4})
      if (!check(chain_kernel(isa, bf16), bf16, form, 1 + round % 2)) return false;
    return true;
  });
}
