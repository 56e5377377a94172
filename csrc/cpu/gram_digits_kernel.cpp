// Digits, and their products in the tile registers of AMX: 16 by 32 entries of C at a time, over all rows of X.
#include "cpu/gram_digits.h"

#include "cpu/tile_registers.h"

namespace vitlr {
namespace {

inline __mmask16 mask_of(int64_t columns) {
  return columns >= 16 ? 0xffff : columns <= 0 ? 0 : static_cast<__mmask16>((1u << columns) - 1);
}

void largest(const float* X, int64_t row_stride, int64_t T, int64_t columns, uint32_t* found) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i most[kPanelsRead] = {};
  for (int64_t t = 0; t < T; ++t)
#pragma GCC unroll 4
    for (int p = 0; p < kPanelsRead; ++p) {
      const __m512i bits = _mm512_maskz_loadu_epi32(mask_of(columns - 16 * p), X + t * row_stride + 16 * p);
      most[p] = _mm512_max_epi32(most[p], _mm512_and_si512(bits, magnitude));
    }
  for (int p = 0; p < kPanelsRead; ++p) _mm512_storeu_si512(found + 16 * p, most[p]);
}

// Rows of sixteen words to columns.
inline void transpose(__m512i r[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// Digits of sixty-four rows of `panels` panels side by side, whose lines of X are read together.
template <int PANELS>
void pack_step(const float* X, int64_t row_stride, int64_t T, int64_t columns, const float* scale, int8_t* packed,
               int64_t panel_bytes) {
  const __m512i carry = _mm512_set1_epi32(0x00808080), byte = _mm512_set1_epi32(0xff);
  for (int64_t w = 0; w < 16; ++w)
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; ++p) {
      const __mmask16 mask = mask_of(columns - 16 * p);
      const __m512 scales = _mm512_loadu_ps(scale + 16 * p);
      __m512i v[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const int64_t t = 4 * w + i;
        const __m512 x = _mm512_maskz_loadu_ps(t < T ? mask : 0, X + (t < T ? t : 0) * row_stride + 16 * p);
        // Bytes of v + carry, less 128 each, are v's signed digits.
        v[i] = _mm512_xor_si512(_mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(x, scales)), carry), carry);
      }
#pragma GCC unroll 3
      for (int d = 0; d < kDigits; ++d) {  // the highest first
        const int shift = 16 - 8 * d;
        const __m512i one = _mm512_and_si512(_mm512_srli_epi32(v[0], shift), byte);
        const __m512i two = _mm512_slli_epi32(_mm512_and_si512(_mm512_srli_epi32(v[1], shift), byte), 8);
        const __m512i three = _mm512_slli_epi32(_mm512_and_si512(_mm512_srli_epi32(v[2], shift), byte), 16);
        const __m512i four = _mm512_slli_epi32(_mm512_srli_epi32(v[3], shift), 24);
        _mm512_storeu_si512(packed + p * panel_bytes + d * kTileBytes + 64 * w,
                            _mm512_or_si512(_mm512_or_si512(one, two), _mm512_or_si512(three, four)));
      }
    }
}

void pack(const float* X, int64_t row_stride, int64_t T, int64_t columns, const float* scale, int64_t panels,
          int8_t* packed, int64_t panel_bytes) {
  for (int64_t start = 0; start < T; start += kStepRows, packed += kDigits * kTileBytes)
    (panels > 2 ? pack_step<4> : pack_step<2>)(X + start * row_stride, row_stride, T - start, columns, scale, packed,
                                               panel_bytes);
}

void turn(const int8_t* packed, int64_t tiles, int8_t* left) {
  for (; tiles > 0; --tiles, packed += kTileBytes, left += kTileBytes) {
    __m512i words[16];
    for (int w = 0; w < 16; ++w) words[w] = _mm512_loadu_si512(packed + 64 * w);
    transpose(words);
    for (int w = 0; w < 16; ++w) _mm512_storeu_si512(left + 64 * w, words[w]);
  }
}

void begin() { shape_tiles({16, 16, 16, 16, 16, 16, 16, 16}); }

void release() { _tile_release(); }

#define VITLR_LEFT(digit) _tile_loadd(6, left + (digit) * kTileBytes, 64)
#define VITLR_RIGHT(panel, digit) _tile_loadd(7, right + (panel) * panel_bytes + (digit) * kTileBytes, 64)

void products(const int8_t* left, const int8_t* right, int64_t panel_bytes, int64_t steps, const double* left_step,
              const double* right_step, double* const* rows, const int64_t* first, int64_t end) {
  for (int r = 0; r < 16; ++r)
    if (first[r] < end)
      for (int c = 0; c < 32; c += 8) _mm_prefetch(reinterpret_cast<const char*>(rows[r] + c), _MM_HINT_T0);
  written();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  for (int64_t k = 0; k < steps; ++k, left += kDigits * kTileBytes, right += kDigits * kTileBytes) {
    VITLR_LEFT(0);  // a a', a b', a c'
    VITLR_RIGHT(0, 2);
    _tile_dpbssd(2, 6, 7);
    VITLR_RIGHT(1, 2);
    _tile_dpbssd(5, 6, 7);
    VITLR_RIGHT(0, 1);
    _tile_dpbssd(1, 6, 7);
    VITLR_RIGHT(1, 1);
    _tile_dpbssd(4, 6, 7);
    VITLR_RIGHT(0, 0);
    _tile_dpbssd(0, 6, 7);
    VITLR_RIGHT(1, 0);
    _tile_dpbssd(3, 6, 7);
    VITLR_LEFT(1);  // b a', b b'
    _tile_dpbssd(4, 6, 7);
    VITLR_RIGHT(1, 1);
    _tile_dpbssd(5, 6, 7);
    VITLR_RIGHT(0, 1);
    _tile_dpbssd(2, 6, 7);
    VITLR_RIGHT(0, 0);
    _tile_dpbssd(1, 6, 7);
    VITLR_LEFT(2);  // c a'
    _tile_dpbssd(2, 6, 7);
    VITLR_RIGHT(1, 0);
    _tile_dpbssd(5, 6, 7);
  }
  alignas(64) int32_t sums[6][16][16];
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  _tile_stored(2, sums[2], 64);
  _tile_stored(3, sums[3], 64);
  _tile_stored(4, sums[4], 64);
  _tile_stored(5, sums[5], 64);
  written();
  const __m512d high = _mm512_set1_pd(0x1p32), middle = _mm512_set1_pd(0x1p24), low = _mm512_set1_pd(0x1p16);
  for (int r = 0; r < 16; ++r) {
    if (first[r] >= end) continue;
    const __m512d step = _mm512_set1_pd(left_step[r]);
    for (int c = 0; c < 32; c += 8) {
      const int begin = static_cast<int>(first[r]) - c, stop = static_cast<int>(end) - c;
      if (begin >= 8 || stop <= 0) continue;
      const unsigned until = stop >= 8 ? 0xffu : (1u << stop) - 1, from = begin <= 0 ? 0u : (1u << begin) - 1;
      const __mmask8 mask = static_cast<__mmask8>(until & ~from);
      const int tile = c / 16 * 3;
      const auto load = [&](int place) {
        return _mm512_cvtepi32_pd(_mm256_load_si256(reinterpret_cast<const __m256i*>(&sums[tile + place][r][c % 16])));
      };
      const __m512d value =
          _mm512_fmadd_pd(load(0), high, _mm512_fmadd_pd(load(1), middle, _mm512_mul_pd(load(2), low)));
      const __m512d size = _mm512_mul_pd(step, _mm512_loadu_pd(right_step + c));
      double* out = rows[r] + c;
      _mm512_mask_storeu_pd(out, mask, _mm512_fmadd_pd(value, size, _mm512_maskz_loadu_pd(mask, out)));
    }
  }
}

}  // namespace

const DigitsKernel& digits_amx_int8() {
  static constexpr DigitsKernel kernel = {largest, pack, turn, products, begin, release};
  return kernel;
}

}  // namespace vitlr
