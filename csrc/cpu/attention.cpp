// Driver of attention: heads share nothing, so each is one task, or a few where there are more threads than heads.
#include "cpu/attention.h"

#include <algorithm>
#include <atomic>
#include <new>

#include "cpu/scratch.h"
#include "cpu/team.h"

namespace vitlr {

const AttentionKernel& attention_kernel(Isa isa, bool bf16) {
#ifdef VITLR_WITH_AMX_INT8
  if (isa >= kAmxInt8 && bf16) return attention_bf16_amx_int8();
#endif
#ifdef VITLR_WITH_AVX512_BF16
  if (isa >= kAvx512Bf16) return bf16 ? attention_bf16_avx512_bf16() : attention_fp32_avx512_bf16();
#endif
#ifdef VITLR_WITH_AVX512
  if (isa >= kAvx512) return bf16 ? attention_bf16_avx512() : attention_fp32_avx512();
#endif
#ifdef VITLR_WITH_AVX2
  if (isa >= kAvx2) return bf16 ? attention_bf16_avx2() : attention_fp32_avx2();
#endif
  return bf16 ? attention_bf16_portable() : attention_fp32_portable();
}

void run_attention(const AttentionKernel& kernel, const Attention& call, int threads) {
  const int64_t heads = call.images * call.heads;
  if (heads <= 0 || call.queries <= 0 || call.keys <= 0 || call.width <= 0) return;
  // Every share of a head packs its keys and values again, which costs as much as a tenth of all queries.
  const int64_t tiles = (call.queries + kernel.rows - 1) / kernel.rows;
  const int64_t shares = std::min(tiles, (threads + heads - 1) / heads);
  const int team = team_of(threads, heads * shares);
  const int64_t room = kernel.room(call.keys, call.width, call.width);
  std::atomic<bool> failed{false};
#pragma omp parallel for num_threads(team) if (team > 1) schedule(dynamic, 1)
  for (int64_t task = 0; task < heads * shares; ++task) {
    const int64_t image = task / shares / call.heads, head = task / shares % call.heads, share = task % shares;
    const int64_t first = call.queries * share / shares, end = call.queries * (share + 1) / shares;
    const auto at = [&](const void* base, const Strides& strides, int64_t row, const int64_t* starts = nullptr) {
      const int64_t column = starts ? starts[head] : head * strides.head;
      return static_cast<const char*>(base) + (image * strides.image + column + row * strides.row) * kernel.bytes;
    };
    const Strides y{call.queries * call.heads * call.width, call.width, call.heads * call.width};
    Head one{};
    one.q = at(call.q, call.q_strides, first, call.starts), one.q_stride = call.q_strides.row;
    one.k = at(call.k, call.k_strides, 0, call.starts), one.k_stride = call.k_strides.row;
    one.v = at(call.v, call.v_strides, 0), one.v_stride = call.v_strides.row;
    one.width = call.starts ? call.starts[head + 1] - call.starts[head] : call.width, one.value_width = call.width;
    one.queries = end - first, one.keys = call.keys, one.scale = call.scale;
    one.y = const_cast<char*>(at(call.y, y, first)), one.y_stride = y.row;
    if (call.bias) one.bias = at(call.bias, call.bias_strides, first), one.bias_stride = call.bias_strides.row;
    one.memory = scratch.reserve(room);
    if (one.memory)
      kernel.head(one);
    else
      failed = true;  // an exception must not leave the region
  }
  if (failed) throw std::bad_alloc();
}

}  // namespace vitlr
