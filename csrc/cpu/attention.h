// Attention softmax(scale q kᵀ + bias) v, head by head: the scores of a dozen queries at a time, which never leave the cache.
#pragma once
#include <cstdint>

#include "cpu/isa.h"

namespace vitlr {

// One head of one image. Rows of q, k and v lie at strides in elements; the entries of a row are contiguous.
struct Head {
  const void *q, *k, *v;  // [queries, width], [keys, width], [keys, value_width]
  int64_t q_stride, k_stride, v_stride;
  int64_t queries, keys, width, value_width;
  float scale;  // > 0
  void* y;      // [queries, value_width], rows at `y_stride`
  int64_t y_stride;
  void* memory;  // room of `AttentionKernel::room` bytes
  const void* bias;  // [queries, keys], rows at `bias_stride`, or none; -inf where a query does not see a key
  int64_t bias_stride;
};

// What one instruction set brings for one dtype. Plain functions, no std types, for the reason given in chain.h.
struct AttentionKernel {
  int64_t rows;   // of a tile of queries
  int64_t bytes;  // of an element
  int64_t (*room)(int64_t keys, int64_t width, int64_t value_width);
  void (*head)(const Head& head);
};

const AttentionKernel& attention_fp32_portable();
const AttentionKernel& attention_bf16_portable();
const AttentionKernel& attention_fp32_avx2();
const AttentionKernel& attention_bf16_avx2();
const AttentionKernel& attention_fp32_avx512();
const AttentionKernel& attention_bf16_avx512();
const AttentionKernel& attention_fp32_avx512_bf16();
const AttentionKernel& attention_bf16_avx512_bf16();
const AttentionKernel& attention_bf16_amx_int8();

const AttentionKernel& attention_kernel(Isa isa, bool bf16);

struct Strides {
  int64_t image, head, row;  // in elements
};

struct Attention {
  const void *q, *k, *v;  // [images, heads, queries or keys, width]
  Strides q_strides, k_strides, v_strides;
  int64_t images, heads, queries, keys, width;
  float scale;
  void* y;  // [images, queries, heads, width], contiguous: as the next linear reads it
  const void* bias = nullptr;  // [images, heads, queries, keys], or none; strides of 0 where several share one
  Strides bias_strides = {};
  // [heads + 1]: where q and k of every head begin in a row, and end, where they are narrower than `width`, that of v and
  // y; none: at the strides of a head.
  const int64_t* starts = nullptr;
};

// Throws std::bad_alloc without memory for packed keys and values of one head a thread.
void run_attention(const AttentionKernel& kernel, const Attention& call, int threads);

}  // namespace vitlr
