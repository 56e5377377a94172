// Chains of linear layers on blocks of rows that stay in cache: x -> layer -> layer ... -> y.
//
// A low-rank linear is a chain of two layers, a low-rank MLP one of four with an activation inside. What lies between
// two layers exists for one block of rows at a time, in the L2 of the core that works on it.
#pragma once
#include <cstdint>

#include "cpu/isa.h"

namespace vitlr {

enum Activation { kNone, kGelu, kGeluTanh, kSilu, kRelu, kSigmoid };
enum Form { kPlain, kInt8, kInt4 };  // how a packed weight is stored: in the dtype of x, or as codes with scales

// Words of 32 bits that a row of a block holds together: column w of row m of a block of `rows` rows lies at
// ((w / kChunk) * rows + m) * kChunk + w % kChunk. Rows are at a fixed distance, so that a dozen of them need one
// register for their address, and twelve rows fill 6 KiB of L1 evenly, whatever K is. Rows of a tile of AMX lie side by
// side: L2 gives them a seventh faster than sixteen lines 512 bytes apart.
#if defined(__AMX_INT8__)
constexpr int64_t kChunk = 16;
#else
constexpr int64_t kChunk = 128;
#endif

// A chain of integers is the same with blocks of u8 and weights of s8, whatever floats x and y are: exact sums in int32.
//
// Rows of a block at most: more make codes cheaper, which are decoded for every block, and weights that AMX multiplies.
constexpr int64_t kMostRows = 192;

// W [N, K] packed by `pack` or `pack_codes`: panels of columns of Wᵀ, each [K][columns of the panel].
struct Weight {
  const void* panels;
  const float* scales;  // of codes: [panel][group of K][columns of the panel]; null otherwise
  int64_t N, K, group;
  Form form;
};

// LayerNorm of a row of x: (x - mean) / sqrt(variance + eps) gamma + beta, both in the dtype of x; none where gamma is null.
struct Norm {
  const void *gamma, *beta;
  float eps;
};

// How the input of a layer of integers becomes bytes: round(x multiplier + shift) in every column, from 0 to 255. The
// last `more` of the K columns read the channels `wide` of x again, all others one each.
struct Bytes {
  const float *multiplier, *shift;  // [K]
  const int32_t* wide;              // [more], rising
  int64_t more;
  Norm norm;  // of x before that, at the first layer of a chain only
};

// Of a layer of integers the scales are [N], one for each row of W, and the bias is in fp32 and never null.
struct Layer {
  Weight weight;
  const Weight* residual;  // y = x weightᵀ + (first input of the chain) residualᵀ; null if there is none
  const void* bias;        // [N] in the dtype of x, or null
  Activation act;
  Bytes input;  // of a layer of integers only
};

// Panel `index` of the columns of one layer on one block of rows: `out = act(a1 W1ᵀ + a2 W2ᵀ + bias) + residual`.
struct Panel {
  const Weight* weights[2];  // the second is null if there is one product only
  const void* blocks[2];
  int64_t index, rows;
  const void* bias;
  Activation act;
  void* next;            // the block of the next layer, or null at the end of the chain
  Bytes next_input;      // what that layer makes of its input
  void* y;               // else y [rows, N], of row stride `y_stride`
  const void* residual;  // [rows, N] in the dtype of x, or null
  int64_t y_stride, residual_stride;
  void* expanded;  // room for one panel of each weight in the words of the multiplication
};

// What one instruction set brings for one dtype of x. Plain functions, no std types: these files are compiled with
// -mavx512f and the like, and an inline function shared with other files would be linked once, possibly as its AVX-512
// version.
struct ChainKernel {
  const char* name;
  int64_t columns;   // of a panel; the last one may be half as wide
  int64_t rows;      // of a tile
  int64_t elements;  // of K in one word of 32 bits: one in fp32, two where bf16 or int16 are multiplied in pairs, or four
  int64_t bytes;     // of an element of x

  int64_t (*packed_bytes)(int64_t N, int64_t K, Form form);
  void (*pack)(const void* W, int64_t row_stride, int64_t column_stride, int64_t N, int64_t K, void* packed);
  // Codes [N, K] (int4: two to a byte) and scales [N, groups] in the dtype of x, both contiguous; the packed scales take
  // packed_bytes(N, 1, kInt8) floats a group.
  void (*pack_codes)(const void* codes, const void* scales, int64_t N, int64_t K, int64_t group, Form form,
                     void* packed, float* packed_scales);
  // block = x [rows, K]; what fills the last word is 0, or anything where the rows of W there are 0.
  void (*fill)(const void* x, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t K, Bytes bytes, void* block);
  void (*panels)(const Panel& first, int64_t end);  // of the index
  // Runs `rounds` rounds of independent multiply-adds in registers; returns the FLOPs done.
  double (*peak)(int64_t rounds);
};

const ChainKernel& chain_fp32_portable();
const ChainKernel& chain_bf16_portable();
const ChainKernel& chain_fp32_avx2();
const ChainKernel& chain_bf16_avx2();
const ChainKernel& chain_fp32_avx512();
const ChainKernel& chain_bf16_avx512();
const ChainKernel& chain_fp32_avx512_bf16();
const ChainKernel& chain_bf16_avx512_bf16();

const ChainKernel& chain_kernel(Isa isa, bool bf16);

const ChainKernel& int8_chain_fp32_portable();
const ChainKernel& int8_chain_bf16_portable();
const ChainKernel& int8_chain_fp32_avx2();
const ChainKernel& int8_chain_bf16_avx2();
const ChainKernel& int8_chain_fp32_avx_vnni();
const ChainKernel& int8_chain_bf16_avx_vnni();
const ChainKernel& int8_chain_fp32_avx512();
const ChainKernel& int8_chain_bf16_avx512();
const ChainKernel& int8_chain_fp32_avx512_vnni();
const ChainKernel& int8_chain_bf16_avx512_vnni();
const ChainKernel& int8_chain_fp32_avx512_bf16();
const ChainKernel& int8_chain_bf16_avx512_bf16();
const ChainKernel& int8_chain_fp32_amx_int8();
const ChainKernel& int8_chain_bf16_amx_int8();

// The chain of integers, x and y in fp32 or bf16; its `pack` takes int8 [N, K].
const ChainKernel& int8_chain_kernel(Isa isa, bool bf16);

struct Rows {
  const void* x;  // [M, K], strides in elements
  int64_t M, K, row_stride, column_stride;
  void* y;               // [M, N of the last layer], contiguous
  const void* residual;  // [M, N], rows at `residual_stride`, or null
  int64_t residual_stride;
};

// Throws std::bad_alloc without memory for the blocks.
void run_chain(const ChainKernel& kernel, const Rows& rows, const Layer* layers, int count, int threads);

// A hash of `samples` spread entries of W [N, K] (of all if that is more than there are), to see writes that nobody told.
uint64_t fingerprint(const void* W, int64_t bytes, int64_t N, int64_t K, int64_t row_stride, int64_t column_stride,
                     int64_t samples);

}  // namespace vitlr
