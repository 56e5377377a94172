// Our layouts against CuTe's own functions: swizzles, panels, matrix descriptors, registers of products. Built and run
// by test_cuda_layouts.py where CUTLASS' headers are.
#include <cstdio>

#include <cute/tensor.hpp>
#include <cute/arch/mma_sm90_desc.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>

#include "cuda/tiles.h"

using namespace vitlr::cuda::lowrank;
using Value = cutlass::bfloat16_t;

namespace {

int wrong = 0, checked = 0;

void expect(bool right, const char* what, long long a, long long b) {
  ++checked;
  if (!right && wrong++ < 10) std::printf("%s: ours %llx, CuTe's %llx\n", what, a, b);
}

template <int ROW_BYTES, class Atom, class Swizzle>
void check_panel() {
  for (uint32_t at = 0; at < 1 << 16; ++at) {
    const uint32_t ours = swizzled<ROW_BYTES>(at), theirs = Swizzle::apply(at);
    expect(ours == theirs, "swizzle", ours, theirs);
  }
  constexpr int columns = ROW_BYTES / 2;
  // CuTe swizzles the address of a pointer into shared memory; any aligned buffer will do.
  alignas(1024) static Value buffer[192 * columns];
  const auto panel = cute::make_tensor(cute::make_smem_ptr(buffer),
                                       cute::tile_to_shape(Atom{}, cute::Shape<cute::_192, cute::Int<columns>>{}));
  for (int row = 0; row < 192; ++row)
    for (int column = 0; column < columns; ++column) {
      const uint32_t ours = swizzled<ROW_BYTES>(row * ROW_BYTES + column * 2);
      const auto theirs = reinterpret_cast<char*>(&panel(row, column)) - reinterpret_cast<char*>(buffer);
      expect(ours == theirs, "panel", ours, theirs);
    }
  // All but the address, which CuTe takes from the device.
  const auto operand = cute::tile_to_shape(Atom{}, cute::Shape<cute::_64, cute::Int<columns>>{});
  const auto tensor = cute::make_tensor(cute::make_smem_ptr(static_cast<Value*>(nullptr)), operand);
  const uint64_t theirs = cute::SM90::GMMA::make_gmma_desc<cute::SM90::GMMA::Major::K>(
      cute::local_tile(tensor, cute::Shape<cute::_64, cute::_16>{}, cute::make_coord(0, 0)));
  constexpr uint64_t leading = uint64_t{0x3FFF} << 16;  // not used by these layouts
  expect((descriptor<ROW_BYTES>(0) & ~leading) == (theirs & ~leading), "descriptor", descriptor<ROW_BYTES>(0), theirs);
}

template <int N>
void check_accumulators() {
  const auto layout = typename cute::SM90::GMMA::CLayout_64xN<N>{};
  for (int lane = 0; lane < kWarpgroup; ++lane)
    for (int i = 0; i < N / 2; ++i) {
      const int ours = accumulator_row(lane, i) + 64 * accumulator_column(lane, i), theirs = layout(lane, i);
      expect(ours == theirs, "accumulator", ours, theirs);
    }
}

}  // namespace

int main() {
  using namespace cute::SM90::GMMA;
  check_panel<128, Layout_K_SW128_Atom<Value>, cute::Swizzle<3, 4, 3>>();
  check_panel<64, Layout_K_SW64_Atom<Value>, cute::Swizzle<2, 4, 3>>();
  check_accumulators<64>();
  check_accumulators<96>();
  check_accumulators<128>();
  check_accumulators<192>();
  check_accumulators<256>();
  const auto layout = ALayout_64x16{};
  for (int lane = 0; lane < kWarpgroup; ++lane)
    for (int i = 0; i < 8; ++i) {
      const int ours = operand_row(lane, i / 2) + 64 * (operand_column(lane, i / 2) + i % 2), theirs = layout(lane, i);
      expect(ours == theirs, "operand", ours, theirs);
    }
  for (uint32_t address = 0; address < 1 << 18; address += 1024) {
    cute::GmmaDescriptor theirs{descriptor<128>(address)};
    expect(theirs.bitfield.start_address_ == address >> 4 && theirs.bitfield.base_offset_ == 0 &&
               theirs.bitfield.layout_type_ == 1 && theirs.bitfield.stride_byte_offset_ == 64,
           "bits", address, theirs.bitfield.start_address_);
  }
  std::printf("%d checked, %d wrong\n", checked, wrong);
  return wrong ? 1 : 0;
}
