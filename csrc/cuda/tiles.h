// Where every element of a tile lies on Hopper: panels in shared memory, accumulators and operands in registers.
//
// All products here are `C = A Bᵀ` of row-major A and B ("K-major" for wgmma), so one layout serves all operands: a
// panel is `rows` rows of 64 16-bit values, 128 bytes a row, in the 128-byte swizzle that TMA writes and wgmma reads.
// The host tests compare the functions with CuTe's own.
#pragma once
#include "cuda/host_device.h"

namespace vitlr::cuda::lowrank {

constexpr int kPanelColumns = 64;  // of 16 bits: 128 bytes, the widest swizzle of TMA and wgmma
constexpr int kPanelRowBytes = 128;
constexpr int kWarpgroup = 128;  // threads; it multiplies 64 rows at once
constexpr int kWarpgroupRows = 64;
constexpr int kStep = 16;  // depth of one wgmma of 16-bit values

VITLR_HD constexpr int panels(int columns) { return (columns + kPanelColumns - 1) / kPanelColumns; }

VITLR_HD constexpr int panel_bytes(int rows) { return rows * kPanelRowBytes; }

// The swizzle of rows of 128 bytes: bits 4..6 of an address (which 16 bytes of a row) are xor-ed with bits 7..9 (which
// row of eight). Of rows of 64 bytes: bits 4..5 with bits 7..8. Tiles start at multiples of 1024, so offsets will do.
template <int ROW_BYTES = kPanelRowBytes>
VITLR_HD constexpr uint32_t swizzled(uint32_t address) {
  static_assert(ROW_BYTES == 128 || ROW_BYTES == 64);
  return address ^ ((address >> 3) & (ROW_BYTES - 16));
}

// Address of the 16-bit element (row, column) of a panel at `base`.
VITLR_HD constexpr uint32_t panel_address(uint32_t base, int row, int column) {
  return swizzled(base + row * kPanelRowBytes + column * 2);
}

// The matrix descriptor of wgmma for rows of a panel from `address` on, swizzled, K-major: bits 0..13 address / 16;
// 16..29 leading byte offset / 16 (not used by swizzled layouts: 1); 32..45 bytes from eight rows to the next eight /
// 16; 62..63 the swizzle, 1 for 128 bytes, 2 for 64. Base offset (49..51) is 0: panels start at multiples of 1024.
template <int ROW_BYTES = kPanelRowBytes>
VITLR_HD constexpr uint64_t descriptor(uint32_t address) {
  return (uint64_t{ROW_BYTES == 128 ? 1 : 2} << 62) | (uint64_t{8 * ROW_BYTES / 16} << 32) | (uint64_t{1} << 16) |
         ((address & 0x3FFFF) >> 4);
}

// The descriptor of what lies `bytes` further on. So come the next 16 columns of a panel, too: the hardware swizzles
// the address after it has added them.
VITLR_HD constexpr uint64_t advanced(uint64_t descriptor, int bytes) {
  return descriptor + static_cast<uint64_t>(bytes / 16);
}

constexpr int kStepBytes = kStep * 2;

// Accumulators [64, n] of a warpgroup: register i of `lane` (0..127) holds this row and column.
VITLR_HD constexpr int accumulator_row(int lane, int i) { return lane / 32 * 16 + lane % 32 / 4 + (i / 2 % 2) * 8; }

VITLR_HD constexpr int accumulator_column(int lane, int i) { return i / 4 * 8 + lane % 4 * 2 + i % 2; }

// Operand A [64, 16] in registers: register i of four holds two values, of these columns and the next one. It is the
// layout of accumulators 2i and 2i+1 of those 16 columns, so what a product left is the next one's operand as it lies.
VITLR_HD constexpr int operand_row(int lane, int i) { return lane / 32 * 16 + lane % 32 / 4 + i % 2 * 8; }

VITLR_HD constexpr int operand_column(int lane, int i) { return i / 2 * 8 + lane % 4 * 2; }

// Operand A [64, 32] of bytes in registers: register i of four holds four bytes, from this column on, in rows as above.
VITLR_HD constexpr int byte_operand_column(int lane, int i) { return i / 2 * 16 + lane % 4 * 4; }

// Of sixteen columns a lane holds 2t, 2t + 1, 8 + 2t and 9 + 2t of accumulators, and of such operands 4t to 4t + 3. So
// where rows of B come in this order, what a product left is the next one's operand as it lies: row i of a panel holds
// row woven(i), and accumulators 8j to 8j + 7 of a lane hold four columns of two rows, from woven_column on.
VITLR_HD constexpr int woven(int i) { return i / 16 * 16 + i / 2 % 4 * 4 + i / 8 % 2 * 2 + i % 2; }
VITLR_HD constexpr int woven_column(int lane, int j) { return j * 16 + lane % 4 * 4; }

}  // namespace vitlr::cuda::lowrank
