// Driver of chains: cuts the rows into blocks that share nothing but the packed weights.
#include "cpu/chain.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <vector>

#include "cpu/scratch.h"
#include "cpu/team.h"

namespace vitlr {
namespace {

constexpr int64_t kBlockBytes = 640 << 10;  // of all blocks of a chain; the rest of a 1 MiB L2 is for panels of weights
constexpr int64_t kEnoughRows = 96;  // more make weights no cheaper, and every level of cache fuller

int64_t block_words(int64_t width, const ChainKernel& kernel) {  // of one row
  const int64_t words = (width + kernel.elements - 1) / kernel.elements;
  return (words + kChunk - 1) / kChunk * kChunk;  // a multiple of every kernel's chunk
}

struct Plan {
  std::vector<int64_t> words;  // of a row of each block: x, and what every layer but the last puts out
  int64_t row_words = 0, panel_words = 0, most_rows = kEnoughRows;
};

Plan plan_of(const ChainKernel& kernel, const Layer* layers, int count) {
  Plan plan;
  for (int i = 0; i < count; ++i) {
    plan.words.push_back(block_words(layers[i].weight.K, kernel));
    plan.row_words += plan.words.back();
    int64_t panel = 0;
    for (const Weight* weight : {&layers[i].weight, layers[i].residual})
      if (weight) {
        if (weight->form != kPlain || kernel.elements * kernel.bytes != 4) plan.most_rows = kMostRows;
        panel += (weight->K + kernel.elements - 1) / kernel.elements * kernel.columns;
      }
    plan.panel_words = std::max(plan.panel_words, panel);
  }
  return plan;
}

struct Share {
  int64_t index, count;
};

// Rows first .. first + count through all layers; of the last one a share of the columns.
void run_block(const ChainKernel& kernel, const Rows& rows, const Layer* layers, int layer_count, const Plan& plan,
               int64_t first, int64_t count, Share share, char* memory) {
  const auto at = [&](const void* base, int64_t offset) {
    return base ? static_cast<const char*>(base) + offset * kernel.bytes : nullptr;
  };
  char* const expanded = memory;
  char* const x = memory + plan.panel_words * 4;
  kernel.fill(at(rows.x, first * rows.row_stride), rows.row_stride, rows.column_stride, count, rows.K, layers[0].input, x);
  char* block = x;
  for (int i = 0; i < layer_count; ++i) {
    const Layer& layer = layers[i];
    const int64_t N = layer.weight.N;
    const bool last = i + 1 == layer_count;
    char* const next = block + count * plan.words[i] * 4;
    Panel call{};
    call.weights[0] = &layer.weight, call.weights[1] = layer.residual;
    call.blocks[0] = block, call.blocks[1] = x;
    call.rows = count, call.bias = layer.bias, call.act = layer.act, call.expanded = expanded;
    if (last) {
      call.y = const_cast<char*>(at(rows.y, first * N)), call.y_stride = N;
      call.residual = at(rows.residual, first * rows.residual_stride), call.residual_stride = rows.residual_stride;
    } else {
      call.next = next, call.next_input = layers[i + 1].input;
    }
    const int64_t panels = (N + kernel.columns - 1) / kernel.columns;
    call.index = last ? panels * share.index / share.count : 0;
    kernel.panels(call, last ? panels * (share.index + 1) / share.count : panels);
    block = next;
  }
}

// Whether nearly all multiplications are in the last layer, so that several threads may each do the others for themselves.
bool ends_widest(const Layer* layers, int count) {
  int64_t all = 0, last = 0;
  for (int i = 0; i < count; ++i) {
    last = layers[i].weight.N * (layers[i].weight.K + (layers[i].residual ? layers[i].residual->K : 0));
    all += last;
  }
  return 8 * last > 7 * all;
}

}  // namespace

const ChainKernel& chain_kernel(Isa isa, bool bf16) {
#ifdef VITLR_WITH_AVX512_BF16
  if (isa >= kAvx512Bf16) return bf16 ? chain_bf16_avx512_bf16() : chain_fp32_avx512_bf16();
#endif
#ifdef VITLR_WITH_AVX512
  if (isa >= kAvx512) return bf16 ? chain_bf16_avx512() : chain_fp32_avx512();
#endif
#ifdef VITLR_WITH_AVX2
  if (isa >= kAvx2) return bf16 ? chain_bf16_avx2() : chain_fp32_avx2();
#endif
  return bf16 ? chain_bf16_portable() : chain_fp32_portable();
}

void run_chain(const ChainKernel& kernel, const Rows& rows, const Layer* layers, int count, int threads) {
  if (rows.M <= 0 || count <= 0) return;
  const Plan plan = plan_of(kernel, layers, count);
  // Tiles of rows, as many to a block as fit, and blocks in equal shares for the threads.
  const int64_t tiles = (rows.M + kernel.rows - 1) / kernel.rows;
  const int64_t fit = std::min(plan.most_rows, kBlockBytes / (plan.row_words * 4)) / kernel.rows;
  int64_t blocks = (tiles + std::max<int64_t>(fit, 1) - 1) / std::max<int64_t>(fit, 1);
  const int64_t shares = tiles < threads && ends_widest(layers, count) ? (threads + tiles - 1) / tiles : 1;
  const int team = team_of(threads, tiles * shares);
  blocks = std::min(tiles, (blocks + team - 1) / team * team);
  const int64_t most = (tiles + blocks - 1) / blocks * kernel.rows;
  const int64_t bytes = (plan.panel_words + most * plan.row_words) * 4;
  std::atomic<bool> failed{false};
#pragma omp parallel for num_threads(team) if (team > 1) schedule(dynamic, 1)
  for (int64_t task = 0; task < blocks * shares; ++task) {
    char* const memory = scratch.reserve(bytes);
    const int64_t b = task / shares;
    const int64_t first = tiles * b / blocks * kernel.rows, end = std::min(rows.M, tiles * (b + 1) / blocks * kernel.rows);
    if (memory)
      run_block(kernel, rows, layers, count, plan, first, end - first, {task % shares, shares}, memory);
    else
      failed = true;  // an exception must not leave the region
  }
  if (failed) throw std::bad_alloc();
}

namespace {

// One to one in `hash` and in `word`: no single change is lost. The rotation brings the top bits, where multiplying
// leaves them (the signs of every other fp32), back to where they spread.
inline uint64_t mixed(uint64_t hash, uint64_t word) {
  hash = (hash ^ word) * 1099511628211u;
  return hash << 29 | hash >> 35;
}

}  // namespace

uint64_t fingerprint(const void* W, int64_t bytes, int64_t N, int64_t K, int64_t row_stride, int64_t column_stride,
                     int64_t samples) {
  uint64_t hash = 14695981039346656037u;
  const int64_t total = N * K, step = samples >= total ? 1 : total / samples;
  if (step == 1 && row_stride == K && column_stride == 1) {  // all of it, at the speed of memory: eight chains at once
    constexpr int chains = 8;
    const char* p = static_cast<const char*>(W);
    uint64_t hashes[chains], words[chains];
    for (int i = 0; i < chains; ++i) hashes[i] = hash + static_cast<uint64_t>(i);
    int64_t left = total * bytes;
    for (; left >= 8 * chains; left -= 8 * chains, p += 8 * chains) {
      std::memcpy(words, p, sizeof words);
      for (int i = 0; i < chains; ++i) hashes[i] = mixed(hashes[i], words[i]);
    }
    for (; left > 0; --left, ++p) hash = mixed(hash, static_cast<unsigned char>(*p));
    for (uint64_t part : hashes) hash = mixed(hash, part);
    return hash;
  }
  for (int64_t i = 0; i < total; i += step) {
    uint64_t value = 0;
    std::memcpy(&value, static_cast<const char*>(W) + (i / K * row_stride + i % K * column_stride) * bytes,
                static_cast<size_t>(bytes));
    hash = mixed(hash, value);
  }
  return hash;
}

}  // namespace vitlr
