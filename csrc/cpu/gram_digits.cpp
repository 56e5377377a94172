// Driver of the Gram update from digits: packs up to kRowsPacked rows of X for all, then shares out rectangles of C.
#include "cpu/gram_digits.h"

#include <algorithm>
#include <new>
#include <vector>

#include "cpu/gram.h"
#include "cpu/scratch.h"
#include "cpu/team.h"

namespace vitlr {
namespace {

constexpr int64_t kRowsPacked = 2048;  // three bytes an entry: 19 MB for n = 3072; sums stay far below 2^31
constexpr int64_t kLeftPanels = 8;     // stay in L2 while the right ones pass by: 0.8 MB at 2048 rows
constexpr int64_t kRightPanels = 64;   // of a task
constexpr float kSmallest = 0x1p-100f;

struct Task {
  int64_t left, right;  // first panels
};

}  // namespace

bool gram_update_digits(double* C, bool triangle, const float* X, int64_t T, int64_t n, int64_t row_stride,
                        int threads, const DigitsKernel& kernel) {
  const int64_t wide = kPanel16 * kPanelsRead, strips = (n + wide - 1) / wide;
  const int64_t panels = (n + 2 * kPanel16 - 1) / (2 * kPanel16) * 2;  // in pairs
  std::vector<float> largest(strips * wide), scale(strips * wide);
  std::vector<double> step(strips * wide);
  std::vector<Task> tasks;
  for (int64_t i = 0; i < panels; i += kLeftPanels)
    for (int64_t j = i; j < panels; j += kRightPanels) tasks.push_back({i, j});
  const int64_t most = (std::min(T, kRowsPacked) + kStepRows - 1) / kStepRows * kDigits * kTileBytes;
  const int packers = team_of(threads, strips), team = team_of(threads, static_cast<int64_t>(tasks.size()));
  int8_t* const packed = reinterpret_cast<int8_t*>(between.reserve((panels + team * kLeftPanels) * most));
  if (!packed) throw std::bad_alloc();

  // One scale for all rows, so that it is known before C is touched.
#pragma omp parallel for num_threads(packers) if (packers > 1)
  for (int64_t s = 0; s < strips; ++s)
    kernel.largest(X + s * wide, row_stride, T, n - s * wide, reinterpret_cast<uint32_t*>(largest.data()) + s * wide);
  for (int64_t c = 0; c < strips * wide; ++c) {
    if (largest[c] == 0.0f) continue;  // scale and step 0
    if (!(largest[c] >= kSmallest && largest[c] <= 3.4028235e38f)) return false;
    scale[c] = static_cast<float>(kLargestValue / largest[c]);
    step[c] = 1.0 / static_cast<double>(scale[c]);
  }

  for (int64_t start = 0; start < T; start += kRowsPacked) {
    const int64_t rows = std::min(kRowsPacked, T - start), steps = (rows + kStepRows - 1) / kStepRows;
    const int64_t panel_bytes = steps * kDigits * kTileBytes;
#pragma omp parallel for num_threads(packers) if (packers > 1)
    for (int64_t s = 0; s < strips; ++s) {
      const int64_t p = s * kPanelsRead;
      kernel.pack(X + start * row_stride + s * wide, row_stride, rows, n - s * wide, scale.data() + s * wide,
                  std::min(kPanelsRead, panels - p), packed + p * panel_bytes, panel_bytes);
    }
#pragma omp parallel for num_threads(team) if (team > 1) schedule(dynamic, 1)
    for (size_t k = 0; k < tasks.size(); ++k) {
      const auto [i0, j0] = tasks[k];
      const int64_t lefts = std::min(kLeftPanels, panels - i0);
      int8_t* const left = packed + (panels + thread_number() * kLeftPanels) * most;
      kernel.turn(packed + i0 * panel_bytes, lefts * steps * kDigits, left);
      kernel.begin();
      for (int64_t j = j0; j < std::min(j0 + kRightPanels, panels); j += 2)
        for (int64_t i = i0; i < std::min(i0 + lefts, j + 2); ++i) {
          const int64_t row = i * kPanel16, column = j * kPanel16;
          if (row >= n) continue;
          double* entries[kPanel16];
          int64_t first[kPanel16];
          for (int64_t r = 0; r < kPanel16; ++r) {
            const bool there = row + r < n;
            entries[r] = C + (!there ? 0 : triangle ? triangle_row(row + r, n) : (row + r) * n) + column;
            first[r] = there ? std::max<int64_t>(0, row + r - column) : n;
          }
          kernel.products(left + (i - i0) * panel_bytes, packed + j * panel_bytes, panel_bytes, steps,
                          step.data() + row, step.data() + column, entries, first, n - column);
        }
      kernel.release();
    }
  }
  return true;
}

}  // namespace vitlr
