// Symmetric Gram update from digits: a column of X in whole steps of its own, three signed digits to the base 256 each.
//
// With v = 2^16 a + 2^8 b + c, products of two entries are 2^32 a a' + 2^24 (a b' + b a') + 2^16 (a c' + b b' + c a'),
// without the last two places. Tiles of bytes sum each place exactly in int32, six products where fp32 has one, at 32
// times its speed; an entry is rounded to 2^-24 of its column's largest, and then nothing is until places come together
// in fp64. Of a column whose largest is some forty times its mean square root, a sum is off by 1e-6 (fp32: 3e-7).
#pragma once
#include <cstdint>

namespace vitlr {

constexpr int64_t kDigits = 3;
constexpr double kLargestValue = 8355000;  // its digits are a < 128: 0x7f7f7f is 8355711, and a product is rounded
constexpr int64_t kPanel16 = 16;           // columns of a panel: a tile's rows, and its words
constexpr int64_t kStepRows = 64;          // rows of X that a tile multiplies
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kPanelsRead = 4;         // looked at and packed together

// One instruction set's part. Plain functions, as in gram.h.
struct DigitsKernel {
  // largest[c] = max |X[t, c]|, as the bits of a float: NaN and Inf are what is largest.
  void (*largest)(const float* X, int64_t row_stride, int64_t T, int64_t columns, uint32_t* largest);

  // Digits of X[t, c] scale[c] of two or four panels of 16 columns, [panel][step][digit] with tiles of t / 4 by c.
  void (*pack)(const float* X, int64_t row_stride, int64_t T, int64_t columns, const float* scale, int64_t panels,
               int8_t* packed, int64_t panel_bytes);

  // The same with tiles of c by t, as products have them on their left.
  void (*turn)(const int8_t* packed, int64_t tiles, int8_t* left);

  // rows[r][c] += left_step[r] right_step[c] sum_t of products, of one left panel and two right ones side by side, for
  // columns c from first[r] to end.
  void (*products)(const int8_t* left, const int8_t* right, int64_t panel_bytes, int64_t steps, const double* left_step,
                   const double* right_step, double* const* rows, const int64_t* first, int64_t end);

  void (*begin)();  // of a thread's products, which `release` ends
  void (*release)();
};

const DigitsKernel& digits_amx_int8();

// As gram_update without weights, for columns that lie side by side, but for the lower half of C. False, with C as it
// was, where a column holds NaN or Inf or is so small that its steps are no floats.
bool gram_update_digits(double* C, bool triangle, const float* X, int64_t T, int64_t n, int64_t row_stride,
                        int threads, const DigitsKernel& kernel);

}  // namespace vitlr
