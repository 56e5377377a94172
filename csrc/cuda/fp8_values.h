// Values of fp8_body.h: scales of rows, and GELU for a byte in packed halves. triton_kernels/codes.py and activations.py in
// C++.
#pragma once
#include <cstring>

#include "cuda/activations.h"
#include "cuda/host_device.h"

namespace vitlr::cuda::fp8 {

constexpr float kLargest = 416;  // of a row over its scale

struct Scale {
  float s, inverse;
};

VITLR_HD uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

VITLR_HD float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// Of a power of two.
VITLR_HD float inverse_of(float s) { return float_of(0x7F000000u - bits_of(s)); }

// The least power of two with `416 s >= reach`, and its inverse; s is NaN where reach is NaN or Inf.
VITLR_HD Scale scale_of(float reach) {
  const uint32_t bits = (bits_of(fmaxf(reach * (1 / kLargest), 1e-30f)) + 0x7FFFFFu) & 0x7F800000u;
  return {float_of(bits) + 0.0f * reach, float_of(0x7F000000u - bits)};
}

// The scale of act(p) of a row, from the sums of squares of what is multiplied.
template <class Policy>
VITLR_HD Scale known_scale(const float* squares, int parts, const float* reach, lowrank::Act act) {
  float total = 0;
#pragma unroll 1
  for (int part = 0; part < parts; ++part) total += squares[part];
  return scale_of(act == lowrank::Act::sigmoid ? 1 + 0 * total : Policy::square_root(total) * reach[0] + reach[1]);
}

// gelu(s u) / s of two values u, |u| <= 416: `max(u, 0) - |u| 2^q(t)`, t = s |u|, with q of `gelu_e4m3`. Beyond t = 5.2 the
// second term is below half of the least byte. Halves keep 11 bits of what becomes 4. s is a half, at most 2^15: what a
// larger one would make of u is zero as a byte.
template <class Policy>
VITLR_HD typename Policy::Halves gelu(typename Policy::Halves u, typename Policy::Halves s) {
  const auto size = Policy::absolute(u), t = Policy::least(Policy::product(size, s), Policy::both(5.2f));
  auto q = Policy::fma(t, Policy::both(-0.01691008f), Policy::both(-0.52821278f));
  q = Policy::fma(q, t, Policy::both(-1.10468433f));
  q = Policy::fma(q, t, Policy::both(-1.00465394f));
  return Policy::fma(Policy::negative(size), Policy::exp2(q), Policy::most(u, Policy::both(0.0f)));
}

// Activations of one row to bytes over its scale, 32 of them at the most, and the sum of their squares.
template <lowrank::Act ACT, class Policy>
class Bytes {
 public:
  VITLR_HD Bytes(float, float inverse) : inverse(inverse) {}
  VITLR_HD uint16_t made(float p0, float p1) {
    const float y0 = lowrank::activate<ACT>(p0, lowrank::Bf16{}), y1 = lowrank::activate<ACT>(p1, lowrank::Bf16{});
    total = fmaf(y0, y0, fmaf(y1, y1, total));
    return Policy::bytes(y0 * inverse, y1 * inverse);
  }
  VITLR_HD float squares() const { return total; }

 private:
  const float inverse;
  float total = 0;
};

// The squares in halves, too, over 64 s²: 16 of at most 416² are within them, and what is lost is below a byte's least.
template <class Policy>
class Bytes<lowrank::Act::gelu, Policy> {
 public:
  VITLR_HD Bytes(float s, float inverse) : s(s), inverse(inverse), half_s(Policy::both(fminf(s, 32768.0f))) {}
  VITLR_HD uint16_t made(float p0, float p1) {
    const auto y = gelu<Policy>(Policy::halves(p0 * inverse, p1 * inverse), half_s);
    total = Policy::fma(Policy::product(y, Policy::both(1 / 64.0f)), y, total);
    return Policy::bytes(y);
  }
  VITLR_HD float squares() const {
    const auto two = Policy::floats(total);
    return (two.x + two.y) * 64 * s * s;
  }

 private:
  const float s, inverse;
  const typename Policy::Halves half_s;
  typename Policy::Halves total = Policy::both(0.0f);
};

}  // namespace vitlr::cuda::fp8
