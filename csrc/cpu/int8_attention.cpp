// An image after the other where there are as many as threads: what lies between the steps then stays in one core's L2.
#include "cpu/int8_attention.h"

#include <atomic>
#include <cmath>
#include <new>

#include "cpu/scratch.h"
#include "cpu/team.h"

namespace vitlr {
namespace {

// `images` of them from `first` on.
void run_images(const ChainKernel& chain, const AttentionKernel& attention, const Int8Attention& call, int64_t first,
                int64_t images, int threads) {
  const int64_t size = chain.bytes, D = call.heads * call.width, M = images * call.tokens;
  const int64_t narrow = call.starts ? call.starts[call.heads] : D, between_row = 2 * narrow + D;
  const int64_t row = first * call.tokens, N = call.proj[call.proj_count - 1].weight.N;
  char* const qkv = between.reserve(M * (between_row + D) * size);
  if (!qkv) throw std::bad_alloc();
  char* const mixed = qkv + M * between_row * size;
  const auto at = [&](const void* base, int64_t stride) {
    return base ? static_cast<const char*>(base) + row * stride * size : nullptr;
  };
  run_chain(chain, {at(call.x, call.K), M, call.K, call.K, 1, qkv, nullptr, 0}, call.qkv, call.qkv_count, threads);
  const Strides strides{call.tokens * between_row, call.width, between_row};
  const float scale = 1 / std::sqrt(static_cast<float>(call.width));
  run_attention(attention,
                {qkv, qkv + narrow * size, qkv + 2 * narrow * size, strides, strides, strides, images, call.heads,
                 call.tokens, call.tokens, call.width, scale, mixed, nullptr, {}, call.starts},
                threads);
  char* const y = const_cast<char*>(at(call.y, N));
  run_chain(chain, {mixed, M, D, D, 1, y, at(call.residual, call.residual_stride), call.residual_stride}, call.proj,
            call.proj_count, threads);
}

}  // namespace

void run_int8_attention(const ChainKernel& chain, const AttentionKernel& attention, const Int8Attention& call,
                        int threads) {
  if (call.images <= 0 || call.tokens <= 0) return;
  const int team = team_of(threads, call.images);
  if (team < threads) return run_images(chain, attention, call, 0, call.images, threads);
  std::atomic<bool> failed{false};
#pragma omp parallel for num_threads(team) if (team > 1) schedule(dynamic, 1)
  for (int64_t image = 0; image < call.images; ++image) {
    try {
      run_images(chain, attention, call, image, 1, 1);
    } catch (const std::bad_alloc&) {
      failed = true;  // an exception must not leave the region
    }
  }
  if (failed) throw std::bad_alloc();
}

}  // namespace vitlr
