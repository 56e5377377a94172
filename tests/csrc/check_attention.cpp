// Calls the attention kernels over ragged shapes and compares them with naive loops; q, k, v and y are exactly as large as
// what lies in them, so that AddressSanitizer sees a read or write beside them. Built and run by test_sanitizers.py.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/attention.h"
#include "ragged.h"

using namespace vitlr;

namespace {

// [heads, rows, width] as heads of [rows, heads, width], in values that bf16 holds and in the dtype of the kernel.
struct Rows {
  Rows(int64_t heads, int64_t rows, int64_t width, bool bf16)
      : strides{heads * rows * width, width, heads * width}, numbers(heads * rows * width),
        memory(new char[numbers.size() * (bf16 ? 2 : 4)]) {
    std::uniform_int_distribution<int> level(-8, 8);
    for (size_t i = 0; i < numbers.size(); ++i) {
      numbers[i] = static_cast<float>(level(generator)) / 8;
      uint32_t bits;
      std::memcpy(&bits, &numbers[i], 4);
      const uint16_t half = static_cast<uint16_t>(bits >> 16);
      std::memcpy(memory.get() + i * (bf16 ? 2 : 4), bf16 ? static_cast<const void*>(&half) : &bits, bf16 ? 2 : 4);
    }
  }
  const float* row(int64_t head, int64_t index) const { return &numbers[head * strides.head + index * strides.row]; }
  Strides strides;
  std::vector<float> numbers;
  std::unique_ptr<char[]> memory;
};

bool check(const AttentionKernel& kernel, bool bf16, int threads) {
  const int64_t heads = pick({1, 2, 3}), queries = pick({1, 2, 7, 13, 25, 64}), keys = pick({1, 2, 15, 31, 33, 64, 257, 300});
  const int64_t width = pick({1, 2, 15, 16, 31, 33, 64, 300});
  const Rows q(heads, queries, width, bf16), k(heads, keys, width, bf16), v(heads, keys, width, bf16);
  const float scale = 1 / std::sqrt(static_cast<float>(width));
  const Rows bias(pick({1, heads}), queries, keys, bf16);  // of all heads, or of each
  const bool biased = pick({0, 1});
  const Strides shared{0, bias.numbers.size() > size_t(queries * keys) ? keys : 0, bias.strides.row};
  std::unique_ptr<char[]> y(new char[heads * queries * width * kernel.bytes]);
  run_attention(kernel,
                {q.memory.get(), k.memory.get(), v.memory.get(), q.strides, k.strides, v.strides, 1, heads, queries, keys,
                 width, scale, y.get(), biased ? bias.memory.get() : nullptr, shared},
                threads);
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t m = 0; m < queries; ++m) {
      std::vector<double> share(keys);
      double total = 0;
      for (int64_t n = 0; n < keys; ++n) {
        double score = 0;
        for (int64_t c = 0; c < width; ++c) score += double(q.row(h, m)[c]) * k.row(h, n)[c];
        total += share[n] = std::exp(score * scale + (biased ? bias.numbers[h * shared.head + m * shared.row + n] : 0));
      }
      for (int64_t c = 0; c < width; ++c) {
        double expected = 0;
        for (int64_t n = 0; n < keys; ++n) expected += share[n] / total * v.row(h, n)[c];
        uint32_t bits = 0;
        const char* at = y.get() + ((m * heads + h) * width + c) * kernel.bytes;
        std::memcpy(reinterpret_cast<char*>(&bits) + (4 - kernel.bytes), at, kernel.bytes);
        float got;
        std::memcpy(&got, &bits, 4);
        if (!(std::fabs(got - expected) <= (bf16 ? 1e-2 : 2e-6))) {
          std::printf("%s: heads=%ld queries=%ld keys=%ld width=%ld: y[%ld, %ld, %ld] = %g, expected %g\n",
                      bf16 ? "bf16" : "fp32", long(heads), long(queries), long(keys), long(width), long(h), long(m), long(c),
                      got, expected);
          return false;
        }
      }
    }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  return check_all(argc, argv, [](Isa isa, bool bf16, int round) {
    return check(attention_kernel(isa, bf16), bf16, 1 + 3 * (round % 2));
  });
}
