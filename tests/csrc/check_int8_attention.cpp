// Calls the attention of integers over ragged shapes and compares it with its three steps, each called by itself; buffers
// are exactly as large as what lies in them, so that AddressSanitizer sees a read or write beside them. Built and run by
// test_sanitizers.py.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/int8_attention.h"
#include "ragged.h"

using namespace vitlr;

namespace {

std::unique_ptr<float[]> floats(int64_t count, float low, float high) {
  std::unique_ptr<float[]> values(new float[count]);
  std::uniform_real_distribution<float> any(low, high);
  for (int64_t i = 0; i < count; ++i) values[i] = any(generator);
  return values;
}

// Numbers in the dtype of the kernel.
std::unique_ptr<char[]> numbers(int64_t count, bool bf16) {
  const std::unique_ptr<float[]> values = floats(count, -2, 2);
  const int64_t size = bf16 ? 2 : 4;
  std::unique_ptr<char[]> stored(new char[count * size]);
  for (int64_t i = 0; i < count; ++i)  // bf16 is the upper half
    std::memcpy(stored.get() + i * size, reinterpret_cast<const char*>(&values[i]) + (4 - size), static_cast<size_t>(size));
  return stored;
}

struct Linear {
  Linear(const ChainKernel& kernel, int64_t N, int64_t K)
      : codes(new int8_t[N * K]), packed(new char[kernel.packed_bytes(N, K, kInt8)]), scale(floats(N, 0, 1e-3f)),
        bias(floats(N, -1, 1)), multiplier(floats(K, 30, 60)), shift(floats(K, 100, 150)) {
    for (int64_t i = 0; i < N * K; ++i) codes[i] = static_cast<int8_t>(generator());
    kernel.pack(codes.get(), K, 1, N, K, packed.get());
    layer = {{packed.get(), scale.get(), N, K, 1, kInt8}, nullptr, bias.get(), kNone,
             {multiplier.get(), shift.get(), nullptr, 0, {}}};
  }
  std::unique_ptr<int8_t[]> codes;
  std::unique_ptr<char[]> packed;
  std::unique_ptr<float[]> scale, bias, multiplier, shift;
  Layer layer;
};

bool check(Isa isa, bool bf16, int threads) {
  const ChainKernel& chain = int8_chain_kernel(isa, bf16);
  const AttentionKernel& attention = attention_kernel(isa, bf16);
  const int64_t images = pick({1, 2, 3}), tokens = pick({1, 2, 17, 50}), heads = pick({1, 3}), width = pick({1, 15, 32, 64});
  const int64_t K = pick({1, 24, 65}), N = pick({1, 17, 33}), D = heads * width, M = images * tokens;
  const std::unique_ptr<char[]> x = numbers(M * K, bf16), residual = numbers(M * N, bf16);
  const std::unique_ptr<char[]> gamma = numbers(K, bf16), beta = numbers(K, bf16);
  const bool narrow = pick({0, 1});  // queries and keys of some heads
  std::vector<int64_t> starts{0};
  for (int64_t h = 0; h < heads; ++h) starts.push_back(starts.back() + (narrow ? pick({1, (width + 1) / 2, width}) : width));
  const int64_t left = starts.back(), row = 2 * left + D;
  Linear qkv(chain, row, K), proj(chain, N, D);
  if (pick({0, 1})) qkv.layer.input.norm = {gamma.get(), beta.get(), 1e-6f};
  const std::unique_ptr<char[]> between(new char[M * row * chain.bytes]), mixed(new char[M * D * chain.bytes]);
  const std::unique_ptr<char[]> whole(new char[M * 3 * D * chain.bytes]());  // with zeros where channels are gone
  const std::unique_ptr<char[]> y(new char[M * N * chain.bytes]), expected(new char[M * N * chain.bytes]);
  run_int8_attention(chain, attention,
                     {x.get(), &qkv.layer, &proj.layer, 1, 1, images, tokens, K, heads, width, residual.get(), N, y.get(),
                      narrow ? starts.data() : nullptr},
                     threads);
  run_chain(chain, {x.get(), M, K, K, 1, between.get(), nullptr, 0}, &qkv.layer, 1, 1);
  const auto copy = [&](int64_t m, int64_t from, int64_t to, int64_t count) {
    std::memcpy(whole.get() + (m * 3 * D + to) * chain.bytes, between.get() + (m * row + from) * chain.bytes, count * chain.bytes);
  };
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t part = 0; part < 2; ++part)
        copy(m, part * left + starts[h], part * D + h * width, starts[h + 1] - starts[h]);
    copy(m, 2 * left, 2 * D, D);
  }
  const Strides strides{tokens * 3 * D, width, 3 * D};
  const char* const q = whole.get();
  run_attention(attention,
                {q, q + D * chain.bytes, q + 2 * D * chain.bytes, strides, strides, strides, images, heads, tokens, tokens,
                 width, 1 / std::sqrt(static_cast<float>(width)), mixed.get()},
                1);
  run_chain(chain, {mixed.get(), M, D, D, 1, expected.get(), residual.get(), N}, &proj.layer, 1, 1);
  if (std::memcmp(y.get(), expected.get(), static_cast<size_t>(M * N * chain.bytes)) == 0) return true;
  std::printf("%s %s images=%ld tokens=%ld heads=%ld width=%ld K=%ld N=%ld, %ld of queries: not what its steps give\n", chain.name,
              bf16 ? "bf16" : "fp32", long(images), long(tokens), long(heads), long(width), long(K), long(N), long(left));
  return false;
}

}  // namespace

int main(int argc, char** argv) {
  return check_all(argc, argv, [](Isa isa, bool bf16, int round) {
    return check(isa, bf16, 1 + round % 4);
  });
}
