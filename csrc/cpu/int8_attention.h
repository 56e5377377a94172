// The attention of a block of a transformer whose linears multiply bytes: norm, qkv, attention, proj and residual sum.
#pragma once
#include "cpu/attention.h"
#include "cpu/chain.h"

namespace vitlr {

struct Int8Attention {
  const void* x;  // [images, tokens, K], contiguous; K is what the first layer reads
  const Layer *qkv, *proj;
  int qkv_count, proj_count;
  int64_t images, tokens, K, heads, width;  // qkv puts out [3, heads, width], but for narrower q and k
  const void* residual;                     // [images tokens, N], rows at `residual_stride`, or null
  int64_t residual_stride;
  void* y;  // [images, tokens, N of proj], contiguous
  const int64_t* starts = nullptr;  // [heads + 1] of q and k where heads have fewer than `width` there, as in `Attention`
};

// y = residual + proj(softmax(q kᵀ / √width) v). Throws std::bad_alloc without memory for what lies between.
void run_int8_attention(const ChainKernel& chain, const AttentionKernel& attention, const Int8Attention& call, int threads);

}  // namespace vitlr
