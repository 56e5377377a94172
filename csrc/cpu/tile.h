// Blocks of rows, and their products with packed panels; included only by files that are compiled once for each
// instruction set.
//
// A tile of ROWS x panel of the output lives in registers while k runs over all of K: one row of the packed panel is
// loaded, one word of each row of the block is broadcast. The panel (32 columns x K) is read from L2 once for every
// twelve rows, 5 bytes a cycle at most, far enough ahead for out-of-order execution to hide where it comes from.
#pragma once
#include "cpu/chain.h"
#include "cpu/packing.h"
#include "cpu/vector.h"

#if defined(__AVX512F__)
#define VITLR_ROWS 12  // a tile of 12 x 32: 24 accumulators of 32 registers
#elif defined(__AVX2__)
#define VITLR_ROWS 6  // 6 x 16: 12 accumulators of 16 registers
#elif defined(__aarch64__)
#define VITLR_ROWS 8  // 8 x 8: 16 accumulators of 32 registers
#else
#define VITLR_ROWS 4  // 4 x 8: 8 accumulators of 16 registers
#endif

namespace vitlr {
namespace {

constexpr int kRows = VITLR_ROWS;

// What products are added up in: of bytes integers, and typed so, or GCC keeps a copy of every sum in memory.
template <class T>
struct SumOf {
  using Type = Vector;
};

template <class T>
using Sum = typename SumOf<T>::Type;

template <class T>
inline Sum<T> multiply_add(Sum<T> sum, const void* word, Vector w) {
#if defined(__AVX512BF16__)
  if (T::pairs) {
    const __m512i a = _mm512_set1_epi32(static_cast<int>(*static_cast<const Word*>(word)));
    return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)w);
  }
#endif
  return sum + *static_cast<const Float*>(word) * w;
}

// sums [ROWS][kColumns] (+)= block x panel, over `words` words. Registers add up one chunk of K, not all of it: a sum of
// 3072 products in one fp32 chain would be several times less exact than a vendor's GEMM.
template <class T, int ROWS, int VECTORS>
void tile(const Word* block, int64_t next_chunk, int64_t words, const Word* panel, float* sums, bool add) {
  for (int64_t left = words; left > 0; left -= kChunk, block += next_chunk, add = true) {
    const int64_t depth = smaller(left, kChunk);
    Sum<T> sum[ROWS][VECTORS] = {};
    for (int64_t k = 0; k < depth; ++k, panel += VECTORS * kLanes) {
      Vector w[VECTORS];
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) w[v] = load(panel + v * kLanes);
#pragma GCC unroll 16
      for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) sum[m][v] = multiply_add<T>(sum[m][v], block + m * kChunk + k, w[v]);
    }
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) {
        float* at = sums + m * kColumns + v * kLanes;
        store(at, (Vector)(add ? (Sum<T>)load(at) + sum[m][v] : sum[m][v]));
      }
  }
}

using Tile = void (*)(const Word*, int64_t, int64_t, const Word*, float*, bool);

template <class T, int VECTORS>
inline Tile tile_of(int64_t rows) {
  static constexpr Tile tiles[] = {
      tile<T, 1, VECTORS>, tile<T, 2, VECTORS>,  tile<T, 3, VECTORS>,  tile<T, 4, VECTORS>,
#if VITLR_ROWS > 4
      tile<T, 5, VECTORS>, tile<T, 6, VECTORS>,
#endif
#if VITLR_ROWS > 6
      tile<T, 7, VECTORS>, tile<T, 8, VECTORS>,
#endif
#if VITLR_ROWS > 8
      tile<T, 9, VECTORS>, tile<T, 10, VECTORS>, tile<T, 11, VECTORS>, tile<T, 12, VECTORS>,
#endif
  };
  return tiles[rows - 1];
}

// The first word of columns n.. of a row of a block; n is a multiple of the vector's width.
template <class T>
inline Word* block_row(void* block, int64_t rows, int64_t m, int64_t n) {
  const int64_t w = n / T::elements;
  return static_cast<Word*>(block) + (w / kChunk * rows + m) * kChunk + w % kChunk;
}

// In a block, elements are as they are multiplied: bf16 pairs, or fp32.
template <class T>
inline void put_words(Word* p, Vector v) {
  if (T::pairs)
    store_bf16(p, v);
  else
    store(p, v);
}

// Columns n.. of row m of the output of a chain, v and the residual; `width` of them exist, at most a vector of them.
template <class T>
inline void put_output(const Panel& panel, int64_t m, int64_t n, int64_t width, Vector v) {
  const int64_t at = m * panel.y_stride + n, beside = m * panel.residual_stride + n;
  if (width >= kLanes) {
    if (panel.residual) v += elements<T>(panel.residual, beside);
    return put<T>(panel.y, at, v);
  }
  float values[kLanes];
  store(values, v);
  for (int64_t l = 0; l < width; ++l)
    put<T>(panel.y, at + l, panel.residual ? values[l] + element<T>(panel.residual, beside + l) : values[l]);
}

// block = x [rows, K]; what fills the last word is 0.
template <class T>
inline void fill(const void* x, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t K, void* block) {
  constexpr int64_t chunk = kChunk * T::elements;
  for (int64_t m = 0; m < rows; ++m) {
    int64_t k = 0;
    if (column_stride == 1 && T::elements * T::bytes == 4) {  // words are what x consists of
      const char* from = static_cast<const char*>(x) + m * row_stride * T::bytes;
      for (; k + chunk <= K; k += chunk) __builtin_memcpy(block_row<T>(block, rows, m, k), from + k * T::bytes, kChunk * 4);
      Word* rest = block_row<T>(block, rows, m, k);
      if (K % T::elements) rest[(K - k) / T::elements] = 0;
      __builtin_memcpy(rest, from + k * T::bytes, static_cast<uint64_t>((K - k) * T::bytes));
      continue;
    }
    if (column_stride == 1)
      for (; k + kLanes <= K; k += kLanes) put_words<T>(block_row<T>(block, rows, m, k), elements<T>(x, m * row_stride + k));
    for (; k < K; k += kLanes) {
      float values[kLanes] = {};
      for (int64_t l = 0; l < kLanes && k + l < K; ++l)
        values[l] = element<T>(x, m * row_stride + (k + l) * column_stride);
      put_words<T>(block_row<T>(block, rows, m, k), load(values));
    }
  }
}

// Runs independent multiply-adds in registers; returns how many multiplications and additions that were.
template <class T>
double peak_of(int64_t rounds) {
  constexpr int chains = kRows * 2;  // as many as a tile has, enough to hide the latency
  Sum<T> sum[chains];
#pragma GCC unroll 32
  for (int c = 0; c < chains; ++c) sum[c] = (Sum<T>)splat(static_cast<float>(c));  // equal ones would be computed once
  const Word word = 0x3f803f80;  // 1 as fp32, twice as bf16, or any integers
  Vector w = {};
  for (int64_t i = 0; i < rounds; ++i) {
    __asm__ volatile("" : "+m"(w));  // or nothing of this loop would be left
#pragma GCC unroll 32
    for (int c = 0; c < chains; ++c) sum[c] = multiply_add<T>(sum[c], &word, w);
  }
  Sum<T> total = {};  // of values and not of the array, which must not get an address, or it would live in memory
#pragma GCC unroll 32
  for (int c = 0; c < chains; ++c) total += sum[c];
  __asm__ volatile("" : "+m"(total));
  return 2.0 * chains * kLanes * T::elements * static_cast<double>(rounds);
}

}  // namespace
}  // namespace vitlr
