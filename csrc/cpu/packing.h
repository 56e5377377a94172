// Elements of x and of weights in memory, and weights in panels; included only by files that are compiled once for each
// instruction set.
#pragma once
#include "cpu/chain.h"
#include "cpu/vector.h"

namespace vitlr {
namespace {

constexpr int64_t kColumns = 2 * kLanes;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t panels_of(int64_t N) { return (N + kColumns - 1) / kColumns; }
inline int64_t width_of(int64_t N, int64_t panel) { return N - panel * kColumns <= kLanes ? kLanes : kColumns; }
inline int64_t stored_columns(int64_t N) { return N ? (panels_of(N) - 1) * kColumns + width_of(N, panels_of(N) - 1) : 0; }

// What a word of 32 bits of a block and of a panel holds, and what one multiply-add of such words does.
struct Fp32 {  // x in fp32
  static constexpr int64_t elements = 1, bytes = 4;
  static constexpr bool bf16 = false, pairs = false;
};
struct Bf16 {  // x in bf16
#if defined(__AVX512BF16__)
  static constexpr int64_t elements = 2;
  static constexpr bool pairs = true;
#else
  static constexpr int64_t elements = 1;  // multiplied as fp32
  static constexpr bool pairs = false;
#endif
  static constexpr int64_t bytes = 2;
  static constexpr bool bf16 = true;
};

// ---- elements in memory

template <class T>
inline float element(const void* p, int64_t i) {
  if (T::bf16) {
    uint16_t half;
    __builtin_memcpy(&half, static_cast<const char*>(p) + 2 * i, 2);
    return from_bf16(half);
  }
  return static_cast<const Float*>(p)[i];
}

template <class T>
inline Vector elements(const void* p, int64_t i) {
  return T::bf16 ? load_bf16(static_cast<const char*>(p) + 2 * i) : load(static_cast<const Float*>(p) + i);
}

template <class T>
inline void put(void* p, int64_t i, Vector v) {
  if (T::bf16)
    store_bf16(static_cast<char*>(p) + 2 * i, v);
  else
    store(static_cast<Float*>(p) + i, v);
}

template <class T>
inline void put(void* p, int64_t i, float value) {
  if (T::bf16) {
    const uint16_t half = to_bf16(value);
    __builtin_memcpy(static_cast<char*>(p) + 2 * i, &half, 2);
  } else {
    static_cast<Float*>(p)[i] = value;
  }
}

// ---- packed weights

inline int64_t stored_rows(int64_t K, int64_t elements) { return (K + elements - 1) / elements * elements; }

// Bytes of a panel; codes of int4 hold two rows k in one.
template <class T>
inline int64_t panel_bytes(int64_t K, int64_t width, Form form) {
  if (form == kInt8) return K * width;
  if (form == kInt4) return (K + 1) / 2 * width;
  return stored_rows(K, T::elements) * width * T::bytes;
}

template <class T>
int64_t packed_bytes(int64_t N, int64_t K, Form form) {
  return panel_bytes<T>(K, stored_columns(N), form);
}

template <int64_t BYTES>
struct Unsigned {
  typedef uint32_t type __attribute__((may_alias));
};
template <>
struct Unsigned<2> {
  typedef uint16_t type __attribute__((may_alias));
};

template <class T>
void pack(const void* W, int64_t row_stride, int64_t column_stride, int64_t N, int64_t K, void* packed) {
  // What is moved: a word of one or two elements, or one element of 16 bits where words are made of it later.
  using Moved = typename Unsigned<T::elements * T::bytes>::type;
  using Element = typename Unsigned<T::bytes>::type;
  const int64_t depth = (K + T::elements - 1) / T::elements;
  Moved* out = static_cast<Moved*>(packed);
  for (int64_t p = 0; p < panels_of(N); ++p) {
    const int64_t width = width_of(N, p);
    // By squares of rows and columns: what is read a line at a time is written before it leaves L1.
    for (int64_t k0 = 0; k0 < depth; k0 += 16)
      for (int64_t c = 0; c < width; ++c) {
        const int64_t n = p * kColumns + c, whole = column_stride == 1 ? K / T::elements : 0;
        const Element* row = static_cast<const Element*>(W) + n * row_stride;
        for (int64_t k = k0; k < smaller(k0 + 16, depth); ++k) {
          Moved moved = 0;
          if (n < N && k < whole)
            __builtin_memcpy(&moved, row + k * T::elements, sizeof moved);
          else
            for (int64_t e = 0; n < N && e < smaller(T::elements, K - k * T::elements); ++e)
              moved |= static_cast<Moved>(row[(k * T::elements + e) * column_stride]) << (e * 16);
          out[k * width + c] = moved;
        }
      }
    out += depth * width;
  }
}

inline int code(const uint8_t* codes, int64_t n, int64_t k, int64_t K, Form form) {
  if (form == kInt8) return static_cast<int8_t>(codes[n * K + k]);
  return (codes[n * ((K + 1) / 2) + k / 2] >> (k % 2 * 4) & 15) - 8;
}

template <class T>
void pack_codes(const void* source, const void* scale, int64_t N, int64_t K, int64_t group, Form form, void* packed,
                float* scales) {
  const uint8_t* codes = static_cast<const uint8_t*>(source);
  const int64_t groups = (K + group - 1) / group;
  char* out = static_cast<char*>(packed);
  for (int64_t p = 0; p < panels_of(N); ++p) {
    const int64_t width = width_of(N, p);
    for (int64_t c = 0; c < width; ++c) {
      const int64_t n = p * kColumns + c;
      for (int64_t k = 0; k < K; ++k) {
        const int q = n < N ? code(codes, n, k, K, form) : 0;
        if (form == kInt8) {
          out[k * width + c] = static_cast<char>(q);
        } else {
          const int other = n < N && k + 1 < K ? code(codes, n, k + 1, K, form) : 0;
          if (k % 2 == 0) out[k / 2 * width + c] = static_cast<char>((q & 15) | (other & 15) << 4);  // two's complement
        }
      }
      for (int64_t g = 0; g < groups; ++g)
        scales[g * width + c] = n < N ? element<T>(scale, n * groups + g) : 0.0f;
    }
    out += panel_bytes<T>(K, width, form);
    scales += groups * width;
  }
}

// Columns c.. of row k in units of the scale.
inline Vector decode(const char* codes, int64_t k, int64_t c, int64_t width, Form form) {
  if (form == kInt8) return __builtin_convertvector(widened(reinterpret_cast<const AnyBytes*>(codes + k * width + c)), Vector);
  const Integers pair = widened(reinterpret_cast<const AnyBytes*>(codes + k / 2 * width + c));
  return __builtin_convertvector(k % 2 ? pair >> 4 : pair << 28 >> 28, Vector);
}

// Words of rows k (low halves) and k + 1 (high halves) in bf16.
inline Vector paired(Vector even, Vector odd) {
#if defined(__AVX512BF16__)
  alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  return (Vector)_mm512_permutexvar_epi16(_mm512_load_si512(order), halves);
#else
  return (Vector)(widened(to_bf16(even)) | widened(to_bf16(odd)) << 16);
#endif
}

template <class T, Form FORM>
void expand_codes(const char* stored, const float* scales, int64_t K, int64_t group, int64_t width, Word* out) {
  // Scales of rows k and k + 1: a division to find them would cost more than all the rest.
  const float* scale[2] = {scales, group > 1 ? scales : scales + width};
  int64_t left[2] = {group, group > 1 ? group - 1 : group};  // rows for which they hold
  for (int64_t k = 0; k < K; k += T::elements) {
    const bool both = T::pairs && k + 1 < K;
    for (int64_t c = 0; c < width; c += kLanes, out += kLanes) {
      const Vector even = decode(stored, k, c, width, FORM) * load(scale[0] + c);
      if (T::pairs)
        store(out, paired(even, both ? decode(stored, k + 1, c, width, FORM) * load(scale[1] + c) : Vector{}));
      else
        store(out, T::bf16 ? from_bf16(to_bf16(even)) : even);
    }
    for (int i = 0; i < T::elements; ++i)
      for (left[i] -= T::elements; left[i] <= 0; left[i] += group) scale[i] += width;
  }
}

// A panel as it is multiplied. The values of codes are rounded to bf16 where x is bf16, as in the op's definition.
template <class T>
void expand(const char* stored, const float* scales, int64_t K, int64_t group, int64_t width, Form form, Word* out) {
  if (form == kInt8) return expand_codes<T, kInt8>(stored, scales, K, group, width, out);
  if (form == kInt4) return expand_codes<T, kInt4>(stored, scales, K, group, width, out);
  for (int64_t i = 0; i < K * width; i += kLanes) store(out + i, elements<T>(stored, i));
}

}  // namespace
}  // namespace vitlr
