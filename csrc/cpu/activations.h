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

inline Vector gelu_bf16(Vector x) {  // |Φ error| < 2.2e-5, 3.2e-5 beyond c = 4: a hundredth of a bf16 rounding of 1
  static constexpr float P[] = {0.3988475203514099f,     -0.06617537885904312f,   0.009664874523878098f,
                                -0.0010482043726369739f, 8.06673924671486e-05f,   -4.100866135559045e-06f,
                                1.2171109631253785e-07f, -1.5807860576089183e-09f};
  const Vector t = x * x;
  const Vector inside = x * polynomial(P, t) + 0.5f;
  return x * (t < splat(16.0f) ? inside : (x > splat(0.0f) ? splat(1.0f) : splat(0.0f)));
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
