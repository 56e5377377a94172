// Calls the chains of integers over ragged shapes and compares them with naive loops; buffers are exactly as large as what
// lies in them, so that AddressSanitizer sees a read or write beside them. Built and run by test_sanitizers.py.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/chain.h"
#include "ragged.h"

using namespace vitlr;

namespace {

std::unique_ptr<float[]> floats(int64_t count, float low, float high) {
  std::unique_ptr<float[]> values(new float[count]);
  std::uniform_real_distribution<float> any(low, high);
  for (int64_t i = 0; i < count; ++i) values[i] = any(generator);
  return values;
}

// A layer that reads `more` of its channels, any of them, in a further column.
struct Linear {
  Linear(const ChainKernel& kernel, int64_t N, int64_t channels, int64_t more, bool exact)
      : K(channels + more), wide(new int32_t[more]), codes(new int8_t[N * K]),
        packed(new char[kernel.packed_bytes(N, K, kInt8)]), scale(floats(N, 0, 1e-3f)), bias(floats(N, -1, 1)),
        multiplier(floats(K, 30, 60)), shift(floats(K, 100, 150)) {
    for (int64_t i = 0; i < N * K; ++i) codes[i] = static_cast<int8_t>(generator());
    // 32 x + 120 is the same in fp32 and fp64, down to which of its halves are rounded up.
    for (int64_t k = 0; exact && k < K; ++k) multiplier[k] = 32, shift[k] = 120;
    for (int64_t e = 0; e < more; ++e) wide[e] = static_cast<int32_t>(generator() % static_cast<uint64_t>(channels));
    std::sort(wide.get(), wide.get() + more);
    kernel.pack(codes.get(), K, 1, N, K, packed.get());
    layer = {{packed.get(), scale.get(), N, K, 1, kInt8}, nullptr, bias.get(), kNone,
             {multiplier.get(), shift.get(), wide.get(), more}};
  }
  int64_t K;
  std::unique_ptr<int32_t[]> wide;
  std::unique_ptr<int8_t[]> codes;
  std::unique_ptr<char[]> packed;
  std::unique_ptr<float[]> scale, bias, multiplier, shift;
  Layer layer;
};

// Values that bf16 holds as well.
float value_of(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

bool check(const ChainKernel& kernel, bool bf16, int threads) {
  const int64_t M = pick({0, 1, 2, 7, 13, 31, 33, 64, 197}), K = pick({1, 2, 15, 31, 64, 129, 258, 300, 700});
  const int64_t D = pick({1, 3, 16, 17, 33, 64, 530}), N = pick({1, 7, 16, 31, 32, 47, 65, 96});
  Linear first(kernel, D, K, pick({0, 0, 1, 5, 40}), true);
  const Linear second(kernel, N, D, pick({0, 0, 1, 5, 40}), false);
  const std::unique_ptr<char[]> x(new char[M * K * kernel.bytes]), y(new char[M * N * kernel.bytes]);
  std::vector<float> numbers(M * K);
  for (int64_t i = 0; i < M * K; ++i) {
    const uint16_t half = static_cast<uint16_t>(0x3f80 + generator() % 256 + (generator() % 2 << 15));
    numbers[i] = value_of(half);
    std::memcpy(x.get() + i * kernel.bytes, bf16 ? static_cast<const void*>(&half) : &numbers[i], kernel.bytes);
  }
  // A norm makes of x what no fp32 holds, so that halves are rounded either way; gamma and beta are 1 and 1/2.
  const bool normed = K > 1 && pick({0, 1});
  const std::unique_ptr<char[]> gamma(new char[K * kernel.bytes]), beta(new char[K * kernel.bytes]);
  const uint32_t one = 0x3f800000, half = 0x3f000000;
  for (int64_t k = 0; k < K; ++k) {
    std::memcpy(gamma.get() + k * kernel.bytes, reinterpret_cast<const char*>(&one) + 4 - kernel.bytes, kernel.bytes);
    std::memcpy(beta.get() + k * kernel.bytes, reinterpret_cast<const char*>(&half) + 4 - kernel.bytes, kernel.bytes);
  }
  if (normed) first.layer.input.norm = {gamma.get(), beta.get(), 1e-6f};
  const Layer layers[2] = {first.layer, second.layer};
  run_chain(kernel, {x.get(), M, K, K, 1, y.get(), nullptr, 0}, layers, 2, threads);
  for (int64_t m = 0; m < M; ++m) {
    std::vector<double> row(numbers.begin() + m * K, numbers.begin() + (m + 1) * K);
    if (normed) {
      double mean = 0, square = 0;
      for (double v : row) mean += v / double(K);
      for (double v : row) square += (v - mean) * (v - mean) / double(K);
      for (double& v : row) v = (v - mean) / std::sqrt(square + 1e-6) + 0.5;
    }
    // How far entries of the row may be off: bytes whose rounding is a matter of the last bit, and what becomes of them.
    std::vector<double> slack(row.size(), 0.0);
    for (const Linear* linear : std::initializer_list<const Linear*>{&first, &second}) {
      std::vector<double> next(linear->layer.weight.N), loose(next.size());
      for (int64_t e = 0, more = linear->K - int64_t(row.size()); e < more; ++e) {
        row.push_back(row[linear->wide[e]]);
        slack.push_back(slack[linear->wide[e]]);
      }
      for (size_t n = 0; n < next.size(); ++n) {
        int64_t sum = 0;
        double flips = 0;
        for (size_t k = 0; k < row.size(); ++k) {
          const double exact = row[k] * linear->multiplier[k] + linear->shift[k];
          const double q = std::nearbyint(std::fmin(std::fmax(exact, 0), 255));
          const double off = std::fabs(exact - std::floor(exact) - 0.5);
          const double reach = slack[k] * linear->multiplier[k] + (normed || linear == &second ? 1e-3 : 0);
          const int64_t code = linear->codes[n * row.size() + k];
          sum += static_cast<int64_t>(q) * code;
          if (reach > 0 && off <= reach) flips += (std::floor(reach - off) + 1) * double(std::labs(code));
        }
        next[n] = static_cast<double>(sum) * linear->scale[n] + linear->bias[n];
        loose[n] = flips * linear->scale[n];
      }
      row = next, slack = loose;
    }
    for (int64_t n = 0; n < N; ++n) {
      float got;
      if (bf16) {
        uint16_t half;
        std::memcpy(&half, y.get() + 2 * (m * N + n), 2);
        got = value_of(half);
      } else {
        std::memcpy(&got, y.get() + 4 * (m * N + n), 4);
      }
      const double allowed = std::fabs(row[n]) * (bf16 ? 1e-2 : 1e-5) + 1e-4 + slack[n];
      if (!(std::fabs(got - row[n]) <= allowed)) {
        std::printf("%s %s M=%ld K=%ld D=%ld N=%ld: y[%ld, %ld] = %g, expected %g\n", kernel.name, bf16 ? "bf16" : "fp32",
                    long(M), long(K), long(D), long(N), long(m), long(n), got, row[n]);
        return false;
      }
    }
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  return check_all(argc, argv, [](Isa isa, bool bf16, int round) {
    return check(int8_chain_kernel(isa, bf16), bf16, 1 + round % 2);
  });
}
