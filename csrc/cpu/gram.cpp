// Driver of the Gram update: cuts the upper triangle of C into square tasks that share nothing but X.
//
// A thread packs for itself the columns of X that its task needs, although other tasks pack some of them again. One
// packed copy shared by the threads took, process by process, either 0.36 or 0.65 ms where this takes 0.36 (two threads
// on two virtual cores, n = 192, T = 1576; in the slow case packing took 310 us, against 53 with one thread).
#include "cpu/gram.h"

#include <algorithm>
#include <cstdlib>
#include <new>
#include <vector>

#include "cpu/gram_digits.h"
#include "cpu/team.h"

namespace vitlr {
namespace {

constexpr int64_t kPackedFloats = int64_t{1} << 18;  // of one thread: 1 MiB, the L2 of a current core
constexpr int64_t kSideStep = 48;   // sides of tasks: a multiple of every kernel's rows and panel
constexpr int64_t kSideMax = 768;   // so that 128 rows of both sides fit into kPackedFloats
constexpr int64_t kFewestRows = 64, kFewestColumns = 64;  // fewer leave tiles of bytes empty
constexpr int64_t kBlockSide = 384;  // of what is summed before it is added to a triangle: 1.1 MiB
constexpr int64_t kMirrorRows = 32;  // an 8 KiB square of C and its mirror stay in L1

struct Task {
  int64_t i, j;  // first row and first column; i == j on the diagonal, where half of the square is work
};

int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

// The side with the shortest predicted time: few large tasks pack less, many small ones keep every thread busy.
int64_t choose_side(int64_t n, int64_t threads) {
  int64_t best = 0;
  double best_time = 0;
  for (int64_t cuts = (n + kSideMax - 1) / kSideMax; best == 0 || cuts <= (n + kSideStep - 1) / kSideStep; ++cuts) {
    const int64_t side = round_up((n + cuts - 1) / cuts, kSideStep), across = (n + side - 1) / side;
    // In half squares: one on the diagonal, two off it. Packing 2 x side columns costs as much as 18 columns of C.
    const int64_t halves = std::max<int64_t>(across > 1 ? 2 : 1, (across * across + threads - 1) / threads);
    const double time = static_cast<double>(halves) * side * (side + 18);
    if (best == 0 || time < best_time) best = side, best_time = time;
  }
  return best;
}

std::vector<Task> upper_triangle(int64_t n, int64_t side) {  // the large ones first: the small ones level the threads
  std::vector<Task> tasks;
  for (int64_t i = 0; i < n; i += side)
    for (int64_t j = i + side; j < n; j += side) tasks.push_back({i, j});
  for (int64_t i = 0; i < n; i += side) tasks.push_back({i, i});
  return tasks;
}

struct Buffer {  // 64-byte aligned, as the vector loads need
  explicit Buffer(int64_t floats) : data(static_cast<float*>(std::aligned_alloc(64, (floats * 4 + 63) / 64 * 64))) {
    if (!data) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  float* data;
};

struct Rows {
  const float* X;
  int64_t T, n, row_stride, column_stride;
  const float* weight;
};

// The square of one task, or its upper triangle on the diagonal, in C [., stride] from its first row and column on.
void update(const Rows& rows, Task task, int64_t side, const GramKernel& kernel, float* packed, double* C,
            int64_t stride) {
  const bool diagonal = task.i == task.j;
  const int64_t left = std::min(side, rows.n - task.i), right = diagonal ? 0 : std::min(side, rows.n - task.j);
  // Packed side by side, columns i.. at 0 and columns j.. after them, at `first`.
  const int64_t first = diagonal ? 0 : left, columns = left + right, width = round_up(columns, kernel.panel);
  double* corner = C - first;
  const int64_t group = kPackedFloats / (kDepth * width) * kDepth;  // rows packed at once
  for (int64_t start = 0; start < rows.T; start += group) {
    const int64_t end = std::min(rows.T, start + group);
    for (int64_t t = start; t < end; t += kDepth) {
      const int64_t depth = std::min(kDepth, end - t);
      const float *x = rows.X + t * rows.row_stride, *weight = rows.weight ? rows.weight + t : nullptr;
      float* out = packed + (t - start) * width;
      kernel.pack(x + task.i * rows.column_stride, rows.row_stride, rows.column_stride, weight, left, depth, out);
      if (right)
        kernel.pack(x + task.j * rows.column_stride, rows.row_stride, rows.column_stride, weight, right, depth,
                    out + first * depth);
    }
    const int64_t block = 4 * kernel.rows;  // rows of C whose packed columns are read for one panel after the other
    for (int64_t i = 0; i < left; i += block)
      for (int64_t p = (diagonal ? i : first) / kernel.panel; p * kernel.panel < columns; ++p) {
        const int64_t last = std::min(i + block, diagonal ? (p + 1) * kernel.panel : left);
        for (int64_t t = start; t < end && i < last; t += kDepth)
          kernel.tiles(packed + (t - start) * width, std::min(kDepth, end - t), columns, i, last, p, corner, stride);
      }
  }
}

void mirror(double* C, int64_t n, Task task, int64_t side) {  // the other triangle: C[j, i] = C[i, j]
  const int64_t i_end = std::min(task.i + side, n), j_end = std::min(task.j + side, n);
  for (int64_t i0 = task.i; i0 < i_end; i0 += kMirrorRows)
    for (int64_t j = std::max(task.j, i0); j < j_end; ++j)
      for (int64_t i = i0; i < std::min({i0 + kMirrorRows, i_end, j}); ++i) C[j * n + i] = C[i * n + j];
}

// A task's part of a triangle's rows += block [side, side].
void add_block(double* C, int64_t n, Task task, int64_t side, const double* block) {
  for (int64_t i = task.i; i < std::min(task.i + side, n); ++i) {
    double* const row = C + triangle_row(i, n);
    const double* const found = block + (i - task.i) * side - task.j;
    for (int64_t j = std::max(i, task.j); j < std::min(task.j + side, n); ++j) row[j] += found[j];
  }
}

}  // namespace

const GramKernel& gram_kernel(Isa isa) {
#ifdef VITLR_WITH_AVX512
  if (isa >= kAvx512) return kernel_avx512();
#endif
#ifdef VITLR_WITH_AVX2
  if (isa >= kAvx2) return kernel_avx2();
#endif
  return kernel_portable();
}

void gram_update(double* C, bool triangle, const float* X, int64_t T, int64_t n, int64_t row_stride,
                 int64_t column_stride, const float* weight, int threads, Isa isa) {
  if (T <= 0 || n <= 0) return;
  bool done = false;
#ifdef VITLR_WITH_AMX_INT8
  done = isa >= kAmxInt8 && !weight && column_stride == 1 && T >= kFewestRows && n >= kFewestColumns &&
         gram_update_digits(C, triangle, X, T, n, row_stride, threads, digits_amx_int8());
#endif
  if (done && triangle) return;
  const GramKernel& kernel = gram_kernel(isa);
  const Rows rows{X, T, n, row_stride, column_stride, weight};
  const int64_t side = triangle ? std::min(choose_side(n, threads), kBlockSide) : choose_side(n, threads);
  const std::vector<Task> tasks = upper_triangle(n, side);
  const int64_t count = static_cast<int64_t>(tasks.size());
  const int team = team_of(threads, count);
  const Buffer packed(done ? 1 : team * kPackedFloats);
  std::vector<double> blocks(triangle ? team * side * side : 0);
#pragma omp parallel for num_threads(team) if (team > 1) schedule(dynamic, 1)
  for (int64_t k = 0; k < count; ++k) {
    const Task task = tasks[k];
    float* const own = packed.data + (done ? 0 : thread_number() * kPackedFloats);
    if (triangle) {
      double* const block = blocks.data() + thread_number() * side * side;
      std::fill(block, block + side * side, 0.0);
      update(rows, task, side, kernel, own, block, side);
      add_block(C, n, task, side, block);
    } else {
      if (!done) update(rows, task, side, kernel, own, C + task.i * n + task.j, n);
      mirror(C, n, task, side);
    }
  }
}

}  // namespace vitlr
