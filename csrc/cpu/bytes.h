// Blocks of bytes and their products with panels of int8; included only by files that are compiled once for each
// instruction set.
//
// A word is four bytes of x and four of W where there is an instruction that multiplies u8 by s8 and adds four products
// to an int32 (VNNI, AMX). Elsewhere it is two int16: VPMADDUBSW would add pairs of such products in int16, which cannot
// hold them, so that either a bit of x would go or the sums would saturate without a word.
#pragma once
#include "cpu/tile.h"

namespace vitlr {
namespace {

struct Int8 {
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
  static constexpr int64_t elements = 4;
#else
  static constexpr int64_t elements = 2;
#endif
};

template <>
struct SumOf<Int8> {
  using Type = Integers;
};

template <>
inline Integers multiply_add<Int8>(Integers sum, const void* word, Vector w) {
  const int32_t a = static_cast<int32_t>(*static_cast<const Word*>(word));
#if defined(__AVX512VNNI__)
  return (Integers)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(a), (__m512i)w);
#elif defined(__AVXVNNI__)
  return (Integers)_mm256_dpbusd_avx_epi32((__m256i)sum, _mm256_set1_epi32(a), (__m256i)w);
#elif defined(__AVX512BW__)
  return sum + (Integers)_mm512_madd_epi16(_mm512_set1_epi32(a), (__m512i)w);
#elif defined(__AVX2__)
  return sum + (Integers)_mm256_madd_epi16(_mm256_set1_epi32(a), (__m256i)w);
#elif defined(__SSE2__)
  return sum + (Integers)_mm_madd_epi16(_mm_set1_epi32(a), (__m128i)w);
#else
  const Integers pair = (Integers)w;
  return sum + (pair << 16 >> 16) * (a & 0xffff) + (pair >> 16) * (a >> 16);
#endif
}

// The nearest integers from 0 to 255 for `put_bytes`, which cuts off what AVX-512 leaves above; those of a NaN are 0.
inline Integers nearest_bytes(Vector v) {
#if defined(__AVX512F__)
  // The second one where the first is a NaN. What no int32 holds becomes 2^31, if unsigned.
  const __m512 positive = _mm512_max_ps((__m512)v, _mm512_setzero_ps());
  return (Integers)_mm512_cvtps_epi32(Int8::elements == 4 ? positive : _mm512_min_ps(positive, _mm512_set1_ps(255.0f)));
#endif
  v = v > splat(0.0f) ? v : splat(0.0f);
  v = v < splat(255.0f) ? v : splat(255.0f);
  return (Integers)(v + splat(12582912.0f)) & 0xff;  // 1.5 * 2^23: the last bit is 1
}

// kLanes elements of a block.
inline void put_bytes(Word* p, Integers bytes) {
#if defined(__AVX512F__)
  if (Int8::elements == 4)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtusepi32_epi8((__m512i)bytes));
  else
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)bytes));
#elif defined(__AVX2__)
  const __m256i all = (__m256i)bytes;
  const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  if (Int8::elements == 4)
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(halves, halves));
  else
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), halves);
#else
  typedef int16_t Shorts __attribute__((vector_size(VITLR_BYTES / 2)));
  const Shorts halves = __builtin_convertvector(bytes, Shorts);
  __builtin_memcpy(p, &halves, sizeof halves);
#endif
}

// `count` elements of a block, at most kLanes.
inline void put_some_bytes(Word* p, Integers bytes, int64_t count) {
  if (count >= kLanes) return put_bytes(p, bytes);
  Word all[kLanes];
  put_bytes(all, bytes);
  __builtin_memcpy(p, all, static_cast<uint64_t>(count * 4 / Int8::elements));
}

// kLanes floats from p, of which `count` exist.
inline Vector load_some(const float* p, int64_t count) {
  if (count >= kLanes) return load(p);
  float values[kLanes] = {};
  for (int64_t l = 0; l < count; ++l) values[l] = p[l];
  return load(values);
}

// Words of a row of W; a tile of AMX holds sixteen.
inline int64_t stored_words(int64_t K) {
  const int64_t words = (K + Int8::elements - 1) / Int8::elements;
#if defined(__AMX_INT8__)
  return (words + 15) / 16 * 16;
#else
  return words;
#endif
}

// W [N, K] in panels; 0 where no row or no element exists, so that whatever meets it in a block adds nothing.
inline void pack_bytes(const void* W, int64_t row_stride, int64_t column_stride, int64_t N, int64_t K, void* packed) {
  constexpr int64_t size = 4 / Int8::elements;
  const int8_t* source = static_cast<const int8_t*>(W);
  char* out = static_cast<char*>(packed);
  const int64_t depth = stored_words(K);
  for (int64_t p = 0; p < panels_of(N); ++p) {
    const int64_t width = width_of(N, p);
    for (int64_t c = 0; c < width; ++c)
      for (int64_t k = 0, n = p * kColumns + c; k < depth * Int8::elements; ++k) {
        const int16_t value = n < N && k < K ? source[n * row_stride + k * column_stride] : 0;
        const int64_t word = k / Int8::elements * width + c;
        __builtin_memcpy(out + 4 * word + size * (k % Int8::elements), &value, size);  // the low byte comes first
      }
    out += depth * width * 4;
  }
}

// Columns K + e.. of row m of a block, `count` of them and at most kLanes, of the values of their channels.
inline void put_wide(void* block, int64_t rows, int64_t m, int64_t K, Bytes bytes, int64_t e, int64_t count,
                     const float* values) {
  const Vector v = load(values) * load_some(bytes.multiplier + K + e, count) + load_some(bytes.shift + K + e, count);
  const Integers all = nearest_bytes(v);
  alignas(64) char elements[4 * kLanes];
  constexpr int64_t size = 4 / Int8::elements;
  put_bytes(reinterpret_cast<Word*>(elements), all);
  for (int64_t l = 0; l < count; ++l) {  // they need not begin where a word does
    const int64_t k = K + e + l;
    __builtin_memcpy(reinterpret_cast<char*>(block_row<Int8>(block, rows, m, k)) + k % Int8::elements * size,
                     elements + l * size, size);
  }
}

// Channels k.. of a row of x of K channels; `rest` beyond them.
template <class T>
inline Vector channels(const void* x, int64_t row, int64_t column_stride, int64_t k, int64_t K, float rest) {
  if (column_stride == 1 && k + kLanes <= K) return elements<T>(x, row + k);
  float values[kLanes];
  for (int64_t l = 0; l < kLanes; ++l) values[l] = k + l < K ? element<T>(x, row + (k + l) * column_stride) : rest;
  return load(values);
}

// What LayerNorm makes of the row that begins at `row`: every channel less `mean`, times `rate`, before gamma and beta.
struct Moments {
  float mean, rate;
};

template <class T>
inline Moments moments_of(const void* x, int64_t row, int64_t column_stride, int64_t K, float eps) {
  Vector sum = {}, squares = {};
  for (int64_t k = 0; k < K; k += kLanes) sum += channels<T>(x, row, column_stride, k, K, 0.0f);
  const float mean = sum_of(sum) / static_cast<float>(K);
  for (int64_t k = 0; k < K; k += kLanes) {
    const Vector off = channels<T>(x, row, column_stride, k, K, mean) - mean;
    squares += off * off;
  }
  return {mean, 1.0f / __builtin_sqrtf(sum_of(squares) / static_cast<float>(K) + eps)};
}

// block = the bytes of x [rows, K] in fp32 or bf16, normalised if asked for, and of the channels with further columns.
template <class T, bool NORMED>
void fill_bytes(const void* x, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t K, const Bytes& bytes,
                void* block) {
  const Norm& norm = bytes.norm;
  for (int64_t m = 0; m < rows; ++m) {
    const int64_t row = m * row_stride;
    const Moments moments = NORMED ? moments_of<T>(x, row, column_stride, K, norm.eps) : Moments{};
    for (int64_t k = 0; k < K; k += kLanes) {
      Vector v = channels<T>(x, row, column_stride, k, K, 0.0f);
      if (NORMED)
        v = (v - moments.mean) * moments.rate * channels<T>(norm.gamma, 0, 1, k, K, 0.0f) +
            channels<T>(norm.beta, 0, 1, k, K, 0.0f);
      v = v * load_some(bytes.multiplier + k, K - k) + load_some(bytes.shift + k, K - k);
      put_bytes(block_row<Int8>(block, rows, m, k), nearest_bytes(v));
    }
    for (int64_t e = 0; e < bytes.more; e += kLanes) {
      const int64_t count = smaller(kLanes, bytes.more - e);
      float values[kLanes] = {};
      for (int64_t l = 0; l < count; ++l) {
        const int64_t k = bytes.wide[e + l];
        values[l] = element<T>(x, row + k * column_stride);
        if (NORMED)
          values[l] = (values[l] - moments.mean) * moments.rate * element<T>(norm.gamma, k) + element<T>(norm.beta, k);
      }
      put_wide(block, rows, m, K, bytes, e, count, values);
    }
  }
}

template <class T>
void fill_bytes(const void* x, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t K, Bytes bytes,
                void* block) {
  const auto fill = bytes.norm.gamma ? fill_bytes<T, true> : fill_bytes<T, false>;
  fill(x, row_stride, column_stride, rows, K, bytes, block);
}

}  // namespace
}  // namespace vitlr
