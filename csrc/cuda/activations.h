// Activations of accumulators in fp32, exact to the 16-bit dtype that holds the result: triton_kernels/activations.py,
// where the polynomials come from, in C++. gelu takes 11 instructions an element for bf16, 10 for fp16.
#pragma once
#include <cmath>

#include "cuda/host_device.h"

namespace vitlr::cuda::lowrank {

enum class Act : int { none, gelu, gelu_tanh, silu, sigmoid, relu };

struct Bf16 {};
struct Fp16 {};
struct E4m3 {};  // 8 bits

VITLR_HD float exp2_of(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));  // 2 ulp; infinities and NaN as they should be
  return y;
#else
  return std::exp2(x);
#endif
}

VITLR_HD float quotient(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdividef(a, b);  // 2 ulp for b < 2^126, and 0 beyond, where the quotient of activations is 0 as well
#else
  return a / b;
#endif
}

// `max(p, 0) - t Φ(-t)`, t = |p|; Φ(-t) = 2^q(t) by a minimax q keeps the relative accuracy of the negative tail.
VITLR_HD float gelu(float p, Bf16) {
  const float t = fminf(fabsf(p), 14.0f), h = 0.5f * p;
  float q = fmaf(t, 3.45148146e-06f, -0.000165752339f);
  q = fmaf(q, t, 0.00326369191f);
  q = fmaf(q, t, -0.0347177833f);
  q = fmaf(q, t, -0.493128121f);
  q = fmaf(q, t, -1.12738848f);
  q = fmaf(q, t, -1.00271392f);
  return fmaf(-t, exp2_of(q), h + fabsf(h));  // the sum, not a maximum: it passes NaN on, and -inf as torch does
}

VITLR_HD float gelu(float p, Fp16) {
  const float t = fminf(fabsf(p), 6.0f), h = 0.5f * p;
  float q = fmaf(t, -0.000333233038f, 0.00595060177f);
  q = fmaf(q, t, -0.048649881f);
  q = fmaf(q, t, -0.463567168f);
  q = fmaf(q, t, -1.14942992f);
  q = fmaf(q, t, -1.000103f);
  return fmaf(-t, exp2_of(q), h + fabsf(h));
}

VITLR_HD float logistic(float p) { return quotient(1.0f, 1.0f + exp2_of(-1.4426950408889634f * p)); }

// The activation of a kernel's run-time argument; the compiler takes the switch out of unrolled loops
// (`with_activation`).
template <Act ACT, class T>
VITLR_HD float activate(float p, T dtype) {
  if constexpr (ACT == Act::gelu) return gelu(p, dtype);
  if constexpr (ACT == Act::gelu_tanh) return quotient(p, 1.0f + exp2_of(p * fmaf(p * p, -0.10294324f, -2.3022082f)));
  if constexpr (ACT == Act::silu) return quotient(p, 1.0f + exp2_of(-1.4426950408889634f * p));
  if constexpr (ACT == Act::sigmoid) return logistic(p);
  if constexpr (ACT == Act::relu) return p < 0.0f ? 0.0f : p;  // NaN is not below zero: it stays
  return p;
}

template <Act ACT>
struct Choice {
  static constexpr Act act = ACT;
};

// Calls `f(Choice<act>)`: one branch a tile, none an element.
template <class F>
VITLR_HD void with_activation(Act act, F f) {
  switch (act) {
    case Act::gelu: return f(Choice<Act::gelu>{});
    case Act::gelu_tanh: return f(Choice<Act::gelu_tanh>{});
    case Act::silu: return f(Choice<Act::silu>{});
    case Act::sigmoid: return f(Choice<Act::sigmoid>{});
    case Act::relu: return f(Choice<Act::relu>{});
    default: return f(Choice<Act::none>{});
  }
}

}  // namespace vitlr::cuda::lowrank
