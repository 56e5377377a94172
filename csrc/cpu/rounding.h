// Rounding in turn within one tile of a weight: every error is made up for by the entries that are rounded after it.
#pragma once
#include <cstdint>

namespace vitlr {

// Matrices in fp64, rows at strides in elements, entries of a row contiguous. Entries are rounded from the last row and
// column to the first. With E the errors of the tile and F = E + by_row, the entry (i, j) is rounded as
// W - by_row - by_column, where
//   by_row[i, j]    = what lies right of the tile asks, plus sum_l>j E[i, l] columns[l, j]
//   by_column[i, j] = what lies below the tile asks, plus sum_k>i rows[k, i] F[k, j].
// Both come in with what lies outside and are used up.
struct RoundingTile {
  int64_t height, width;
  const double *W, *step;  // [height, width] at `stride`
  const double *least, *largest;  // [height, width], whole numbers: of a code
  const double* rows;      // [height, height] at `rows_stride`: strictly lower, of the output side
  const double* columns;   // [width, width] at `columns_stride`: strictly lower, of the input side
  double* by_row;          // [height, width], contiguous
  double* by_column;       // [height, width] at `stride`, as all that follow
  double *E, *F, *A, *codes;
  int64_t stride, least_stride, largest_stride, rows_stride, columns_stride;
};

void round_tile(const RoundingTile& tile);

}  // namespace vitlr
