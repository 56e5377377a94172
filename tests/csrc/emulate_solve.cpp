// The blocks of csrc/cuda's products and factorisations, thread by thread on the host: the very functions that the kernels
// call. mode & 1: copies happen only when they are waited for, as late as the hardware may; mode & 2: threads take turns
// backwards within each phase between barriers. A result that depends on either shows a race. mma is written from the
// PTX ISA's table of fragments, not from the functions under test.
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "cuda/cholesky_tiles.h"

using namespace vitlr::cuda;

namespace {

constexpr int kMost = 256;  // threads of a block

struct HostBlock {
  template <class V>
  struct PerThread {
    V of[kMost];
    V& operator[](int thread) { return of[thread]; }
  };
  struct Copy {
    double* to;
    const double* from;
    bool inside;
  };

  int threads, mode;
  std::vector<std::vector<std::vector<Copy>>> pending = std::vector<std::vector<std::vector<Copy>>>(kMost);
  std::vector<std::vector<Copy>> open = std::vector<std::vector<Copy>>(kMost);
  int64_t barriers = 0;

  template <class F>
  void each(F f) {
    for (int i = 0; i < threads; ++i) f(mode & 2 ? threads - 1 - i : i);
  }
  void sync() { ++barriers; }
  void copy(int thread, double* to, const double* from, bool inside) {
    const Copy one{to, from, inside};
    if (mode & 1)
      open[thread].push_back(one);
    else
      perform(one);
  }
  void commit(int thread) {
    if (mode & 1) pending[thread].push_back(std::move(open[thread])), open[thread].clear();
  }
  template <int N>
  void wait(int thread) {
    while (pending[thread].size() > N) {
      for (const Copy& one : pending[thread].front()) perform(one);
      pending[thread].erase(pending[thread].begin());
    }
  }
  static void perform(const Copy& one) { *one.to = one.inside ? *one.from : 0; }

  template <class T>
  void mma(PerThread<Accumulator<T>>& acc, PerThread<Fragments<T>>& f) {
    for (int warp = 0; warp < T::WARPS; ++warp)
      for (int mi = 0; mi < T::MI; ++mi)
        for (int ni = 0; ni < T::NI; ++ni) {
          double A[16][8], B[8][8];
          for (int lane = 0; lane < 32; ++lane) {
            const int group = lane >> 2, in_group = lane % 4, thread = warp * 32 + lane;
            for (int i = 0; i < 4; ++i)  // a_i: row group or group + 8, column in_group or in_group + 4
              A[i == 0 || i == 2 ? group : group + 8][i < 2 ? in_group : in_group + 4] = f[thread].a[mi][i];
            for (int i = 0; i < 2; ++i) B[in_group + 4 * i][group] = f[thread].b[ni][i];
          }
          for (int lane = 0; lane < 32; ++lane)
            for (int i = 0; i < 4; ++i) {  // c_i: row group or group + 8, columns 2 in_group and the next
              const int row = i < 2 ? lane >> 2 : (lane >> 2) + 8, column = lane % 4 * 2 + (i & 1);
              double& c = acc[warp * 32 + lane].c[mi][ni][i];
              for (int k = 0; k < 8; ++k) c += A[row][k] * B[k][column];
            }
        }
  }
};

std::vector<double> poisoned(int64_t count) {
  return std::vector<double>(count, std::numeric_limits<double>::quiet_NaN());
}

template <class T>
void run(const Product& p, int mode) {
  for (int64_t index = 0; index < tile_count<T>(p) * p.batch; ++index) {
    std::vector<double> shared = poisoned(T::SHARED);
    HostBlock block{T::THREADS, mode};
    product_block<T>(block, p, index, shared.data());
  }
}

void run(const Substitution& p, int mode) {
  for (int64_t index = 0; index < ceil_div<int64_t>(p.M, Narrow::BM) * p.batch; ++index) {
    std::vector<double> shared = poisoned(kCholeskyShared);
    HostBlock block{Narrow::THREADS, mode};
    substitution_block(block, p, index, shared.data());
  }
}

Matrix matrix(const int64_t* m) { return {reinterpret_cast<double*>(m[0]), m[1], m[2], m[3]}; }

Product product(const int64_t* s) {
  return {matrix(s), matrix(s + 4), matrix(s + 8), s[12], s[13], s[14], s[15], s[16] != 0, s[17] != 0, s[18] != 0, s[19] != 0};
}

}  // namespace

extern "C" {

// The arguments of the bindings, flattened; wide: tiles of 128.
void weighted_chain(const int64_t* s, int wide, int mode) {
  wide ? run<Wide>(product(s), mode) : run<Narrow>(product(s), mode);
}

void cholesky(const int64_t* s, int mode) {
  const Cholesky p{matrix(s), matrix(s + 4), reinterpret_cast<double*>(s[8]), reinterpret_cast<const double*>(s[9]),
                   reinterpret_cast<int32_t*>(s[10]), s[11], s[12]};
  for (int64_t panel = 0; panel < panels(p.n); ++panel) {
    for (int64_t b = 0; b < p.batch; ++b) {
      std::vector<double> shared = poisoned(kCholeskyShared);
      HostBlock block{Narrow::THREADS, mode};
      factor_block(block, p, panel, b, shared.data());
    }
    if (panel + 1 < panels(p.n)) run(below(p, panel), mode);
  }
}

void back_substitution(const int64_t* s, int mode) {
  const BackSubstitution p{matrix(s), matrix(s + 4), matrix(s + 8), reinterpret_cast<double*>(s[12]), s[13], s[14], s[15]};
  for (int64_t panel = panels(p.n) - 1; panel >= 0; --panel) run(back(p, panel), mode);
}

// How many blocks of a launch cover each entry of a result [M, N], and its multiply-adds over those of all its depths.
double coverage(const int64_t* s, int wide, int32_t* count) {
  const Product p = product(s);
  const auto walk = [&](auto tiles) {
    using T = decltype(tiles);
    double done = 0;
    for (int64_t index = 0; index < tile_count<T>(p); ++index) {
      const TileIndex t = tile_at<T>(p, index);
      const Depths d = depths<T>(p, t);
      done += double(d.last > d.first ? d.last - d.first : 0) * T::BM * T::BN;
      for (int64_t i = t.i * T::BM; i < p.M && i < (t.i + 1) * T::BM; ++i)
        for (int64_t j = t.j * T::BN; j < p.N && j < (t.j + 1) * T::BN; ++j) ++count[i * p.N + j];
    }
    return done / (double(p.M) * p.N * p.K);
  };
  return wide ? walk(Wide()) : walk(Narrow());
}

int prefers_wide(const int64_t* s, int64_t multiprocessors) { return vitlr::cuda::prefers_wide(product(s), multiprocessors); }

// The worst number of lanes of a half-warp that meet in one bank of 8 bytes, over both layouts of both operands.
int bank_conflicts() {
  int worst = 0;
  const auto meet = [&](int row_stride, int depth_stride) {
    for (int half = 0; half < 2; ++half) {
      int banks[16] = {};
      for (int lane = 16 * half; lane < 16 * half + 16; ++lane) ++banks[(lane / 4 * row_stride + lane % 4 * depth_stride) % 16];
      for (const int lanes : banks) worst = lanes > worst ? lanes : worst;
    }
  };
  double nothing[1];
  for (const bool deep : {false, true}) {
    const Staged wide = staged<Wide::BM, Wide::BK, Wide::PAD>(nothing, deep);
    const Staged narrow = staged<Narrow::BM, Narrow::BK, Narrow::PAD>(nothing, deep);
    meet(wide.row_stride, wide.depth_stride), meet(narrow.row_stride, narrow.depth_stride);
  }
  meet(kLeading, 1);
  return worst;
}
}
