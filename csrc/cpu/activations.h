// Activations of vectors in fp32; included only by files that are compiled once for each instruction set.
#pragma once
#include "cpu/chain.h"
#include "cpu/vector.h"

namespace vitlr {
namespace {

template <int TERMS>
inline Vector polynomial(const float (&coefficients)[TERMS], Vector t) {
  Vector sum = splat(coefficients[TERMS - 1]);
#pragma GCC unroll 16
  for (int i = TERMS - 2; i >= 0; --i) sum = sum * t + coefficients[i];
  return sum;
}

// x Φ(x). Φ(x) - 1/2 = x P(x²) / Q(x²) for |x| < c, least maximum error; beyond c, Φ is 0 or 1 (1 - Φ(c) is below the
// error that the output's dtype makes anyway). -Inf gives NaN, as in torch: -Inf * 0.
inline Vector gelu_fp32(Vector x) {  // |Φ error| < 6e-9 before rounding; c = 5.4
  static constexpr float P[] = {0.398942232131958f,    0.03337199613451958f,   0.004650834482163191f,
                                0.000164319048053585f, 6.359977305692155e-06f, 2.338676452495747e-08f};
  static constexpr float Q[] = {1.0f,
                                0.2503172755241394f,
                                0.028378548100590706f,
                                0.0018589665414765477f,
                                7.239920523716137e-05f,
                                1.2165887710580137e-06f};
  const Vector t = x * x;
  const Vector inside = x * polynomial(P, t) / polynomial(Q, t) + 0.5f;
  return x * (t < splat(5.4f * 5.4f) ? inside : (x > splat(0.0f) ? splat(1.0f) : splat(0.0f)));
}

// x, or the nearest of -c and c; NaN becomes either of them.
inline Vector clamped(Vector x, float c) {
#if defined(__AVX512DQ__)
  return (Vector)_mm512_range_ps((__m512)x, (__m512)splat(c), 2);  // the lesser magnitude, with the sign of x
#else
  x = x < splat(-c) ? splat(-c) : x;
  return x > splat(c) ? splat(c) : x;
#endif
}

inline Vector gelu_bf16(Vector x) {  // |Φ error| < 3.3e-5: a sixtieth of a bf16 rounding of 1
  // Exactly 0 at -4 and 1 at 4, where P is 1/8 in fp32 arithmetic, and so beyond.
  static constexpr float P[] = {0.3988308906555176f,    -0.06612874567508698f,  0.009628393687307835f,
                                -0.0010359749430790544f, 7.860102778067812e-05f, -3.916333753295476e-06f,
                                1.1340348038402226e-07f, -1.4323907615576559e-09f};
  const Vector inside = clamped(x, 4.0f);
  return x * (inside * polynomial(P, inside * inside) + 0.5f);
}

// exp(z) = 2ⁿ exp(f), |f| <= ln(2) / 2, by its Taylor series (error 2e-8); 0 below -88, Inf above 89.
inline Vector exponential(Vector z) {
  static constexpr float series[] = {1.0f, 1.0f, 1.0f / 2, 1.0f / 6, 1.0f / 24, 1.0f / 120, 1.0f / 720, 1.0f / 5040};
  const Vector low = splat(-88.3f), high = splat(89.0f), shift = splat(12582912.0f);  // 1.5 * 2^23: the last bit is 1
  z = z < low ? low : z;
  z = z > high ? high : z;
  const Vector shifted = z * 1.44269504f + shift, n = shifted - shift;
  const Vector f = (z - n * 0.693359375f) - n * -2.12194440e-4f;
  const Integers exponent = (Integers)shifted - (Integers)shift + 127;
  return polynomial(series, f) * (Vector)(exponent << 23);
}

// 2ᵗ for t <= 1, by the Taylor series of 2ᶠ, |f| <= 1/2 (error 4e-5: a fiftieth of a bf16 rounding); next to 0 below -125.
inline Vector power_bf16(Vector t) {
  static constexpr float series[] = {1.0f, 0.69314718f, 0.24022651f, 0.05550411f, 0.00961813f};
  const Vector low = splat(-125.0f), shift = splat(12582912.0f);
  t = t < low ? low : t;
  const Vector shifted = t + shift;
  const Vector f = t - (shifted - shift);
  return (Vector)((Integers)polynomial(series, f) + ((Integers)shifted << 23));  // n, added to the exponent
}

inline Vector silu(Vector x) { return x / (exponential(-x) + 1.0f); }

inline Vector sigmoid(Vector x) { return 1.0f / (exponential(-x) + 1.0f); }

inline Vector gelu_tanh(Vector x) {  // x sigmoid(2u) = x (1 + tanh u) / 2
  const Vector u = x * (x * x * (0.7978845608f * 0.044715f) + 0.7978845608f);
  return x / (exponential(-2.0f * u) + 1.0f);
}

template <int ACT, bool BF16>
inline Vector activate(Vector x) {
  if (ACT == kGelu) return BF16 ? gelu_bf16(x) : gelu_fp32(x);
  if (ACT == kGeluTanh) return gelu_tanh(x);
  if (ACT == kSilu) return silu(x);
  if (ACT == kSigmoid) return sigmoid(x);
  if (ACT == kRelu) return x < splat(0.0f) ? splat(0.0f) : x;
  return x;
}

}  // namespace
}  // namespace vitlr
