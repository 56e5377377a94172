// Vectors of one instruction set; included only by files that are compiled once for each (see setup.py).
//
// GCC/Clang vector extensions give the same source SSE, AVX2, AVX-512 or NEON. Everything is in an anonymous namespace:
// an inline function shared between those files would be linked once, possibly as its AVX-512 version.
#pragma once
#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define VITLR_BYTES 64
#elif defined(__AVX2__)
#define VITLR_BYTES 32
#else
#define VITLR_BYTES 16
#endif

namespace vitlr {
namespace {

constexpr int kLanes = VITLR_BYTES / 4;

typedef float Vector __attribute__((vector_size(VITLR_BYTES)));
typedef int32_t Integers __attribute__((vector_size(VITLR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(VITLR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(VITLR_BYTES / 2)));

// Memory may hold anything at any address.
typedef float AnyVector __attribute__((vector_size(VITLR_BYTES), aligned(1), may_alias));
typedef uint16_t AnyHalves __attribute__((vector_size(VITLR_BYTES / 2), aligned(1), may_alias));
typedef int8_t AnyBytes __attribute__((vector_size(VITLR_BYTES / 4), aligned(1), may_alias));
typedef uint32_t Word __attribute__((may_alias));
typedef float Float __attribute__((may_alias));

inline Vector load(const void* p) { return *static_cast<const AnyVector*>(p); }
inline void store(void* p, Vector v) { *static_cast<AnyVector*>(p) = v; }
inline Vector splat(float value) { return Vector{} + value; }

// The largest entry, of those that are no NaN, and the sum of all.
inline float largest_of(Vector v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float top = v[0];
  for (int l = 1; l < kLanes; ++l) top = v[l] > top ? v[l] : top;
  return top;
#endif
}
inline float sum_of(Vector v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float sum = v[0];
  for (int l = 1; l < kLanes; ++l) sum += v[l];
  return sum;
#endif
}

// GCC converts vectors of short integers entry by entry, or in several steps, where one instruction does it.
inline Words widened(Halves h) {
#if defined(__AVX512F__)
  return (Words)_mm512_cvtepu16_epi32((__m256i)h);
#elif defined(__AVX2__)
  return (Words)_mm256_cvtepu16_epi32((__m128i)h);
#else
  return __builtin_convertvector(h, Words);
#endif
}
inline Integers widened(const AnyBytes* p) {
#if defined(__AVX512F__)
  return (Integers)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  return (Integers)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  return __builtin_convertvector(*p, Integers);
#endif
}

// bf16 is the upper half of fp32.
inline Vector from_bf16(Halves h) { return (Vector)(widened(h) << 16); }
inline Vector load_bf16(const void* p) { return from_bf16(*static_cast<const AnyHalves*>(p)); }
inline float from_bf16(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

// Round to nearest even; a NaN stays one.
inline Halves to_bf16(Vector v) {
#if defined(__AVX512BF16__)
  return (Halves)_mm512_cvtneps_pbh((__m512)v);
#else
  const Words bits = (Words)v;
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return __builtin_convertvector(v == v ? rounded : (bits >> 16) | 0x40u, Halves);
#endif
}
inline void store_bf16(void* p, Vector v) { *static_cast<AnyHalves*>(p) = to_bf16(v); }
inline uint16_t to_bf16(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  if (value != value) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace
}  // namespace vitlr
