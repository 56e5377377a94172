// The blocks of csrc/cuda's solve with a thread of the host for each thread of the GPU and real barriers, for
// ThreadSanitizer: a missing barrier is a race that it reports. Arguments: all, product or factor, and the barrier to leave
// out, to see that it does.
// Built and run by test_solve_races.py.
#include <pthread.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cuda/cholesky_tiles.h"

using namespace vitlr::cuda;

namespace {

struct Barrier {
  pthread_barrier_t of;
  explicit Barrier(int threads) { pthread_barrier_init(&of, nullptr, threads); }
  ~Barrier() { pthread_barrier_destroy(&of); }
  void wait() { pthread_barrier_wait(&of); }
};

template <class T>
struct Team {
  Barrier all{T::THREADS};
  std::vector<std::unique_ptr<Barrier>> warps;
  std::vector<Fragments<T>> fragments = std::vector<Fragments<T>>(T::THREADS);
  int left_out;
  explicit Team(int left_out) : left_out(left_out) {
    for (int i = 0; i < T::WARPS; ++i) warps.push_back(std::make_unique<Barrier>(32));
  }
};

template <class Tile>
struct ThreadedBlock {
  template <class V>
  struct PerThread {
    V value;
    V& operator[](int) { return value; }
  };
  int thread;
  Team<Tile>* team;
  int barriers = 0;
  std::vector<std::pair<double*, double>> open{};
  std::deque<std::vector<std::pair<double*, double>>> pending{};

  template <class F>
  void each(F f) {
    f(thread);
  }
  void sync() {
    if (barriers++ != team->left_out) team->all.wait();
  }
  // A copy in flight may write at any time from its start until it is waited for: it does so at both ends.
  void copy(int, double* to, const double* from, bool inside) {
    *to = inside ? *from : 0;
    open.emplace_back(to, *to);
  }
  void commit(int) { pending.push_back(std::move(open)), open.clear(); }
  template <int N>
  void wait(int) {
    for (; pending.size() > N; pending.pop_front())
      for (const auto& [to, value] : pending.front()) *to = value;
  }
  template <class T>
  void mma(PerThread<Accumulator<T>>& acc, PerThread<Fragments<T>>& f) {
    Barrier& warp = *team->warps[thread / 32];
    team->fragments[thread] = f.value;
    warp.wait();
    const Fragments<T>* lanes = &team->fragments[thread / 32 * 32];
    const int group = thread % 32 / 4, pair = thread % 4 * 2;
    for (int mi = 0; mi < T::MI; ++mi)
      for (int ni = 0; ni < T::NI; ++ni)
        for (int i = 0; i < 4; ++i)
          for (int k = 0; k < 8; ++k)
            acc.value.c[mi][ni][i] += lanes[group * 4 + k % 4].a[mi][i / 2 + k / 4 * 2] * lanes[(pair + i % 2) * 4 + k % 4].b[ni][k / 4];
    warp.wait();
  }
};

template <class T, class F>
void run(int left_out, int64_t size, F f) {
  Team<T> team(left_out);
  std::vector<double> shared(size);
  std::vector<std::thread> threads;
  for (int thread = 0; thread < T::THREADS; ++thread)
    threads.emplace_back([&, thread] {
      ThreadedBlock<T> block{thread, &team};
      f(block, shared.data());
    });
  for (std::thread& thread : threads) thread.join();
}

std::vector<double> random(int64_t count) {
  std::mt19937 generator(0);
  std::normal_distribution<double> normal;
  std::vector<double> found(count);
  for (double& x : found) x = normal(generator);
  return found;
}

template <class T>
bool product(int left_out) {
  const int64_t n = T::BM - 3, K = 70;  // five tiles through a ring of three
  std::vector<double> X = random(n * K), out(n * n);
  const Product p{{X.data(), 0, K, 1}, {X.data(), 0, 1, K}, {out.data(), 0, n, 1}, 1, n, n, K, true, false, false, false};
  run<T>(left_out, T::SHARED, [&](auto& block, double* shared) { product_block<T>(block, p, 0, shared); });
  double worst = 0;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double sum = -out[i * n + j];
      for (int64_t k = 0; k < K; ++k) sum += X[i * K + k] * X[j * K + k];
      worst = std::max(worst, std::abs(sum));
    }
  return worst < 1e-11;
}

bool factor(int left_out) {
  const int64_t n = 2 * kPanel + 5;
  std::vector<double> F(n * n), L(n * n), inverse(panels(n) * kPanel * kPanel);
  const std::vector<double> X = random(n * n);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j)
      for (int64_t k = 0; k < n; ++k) F[i * n + j] += X[i * n + k] * X[j * n + k] / n;
  const double shift = 0.1;
  int32_t info = 0;
  const Cholesky p{{F.data(), 0, n, 1}, {L.data(), 0, n, 1}, inverse.data(), &shift, &info, 1, n};
  for (int64_t panel = 0; panel < panels(n); ++panel) {
    run<Narrow>(left_out, kCholeskyShared, [&](auto& block, double* shared) { factor_block(block, p, panel, 0, shared); });
    const Substitution rest = below(p, panel);
    for (int64_t index = 0; panel + 1 < panels(n) && index < ceil_div<int64_t>(rest.M, kPanel); ++index)
      run<Narrow>(left_out, kCholeskyShared, [&](auto& block, double* shared) { substitution_block(block, rest, index, shared); });
  }
  double worst = 0;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j <= i; ++j) {
      double sum = -F[i * n + j] - (i == j ? shift : 0);
      for (int64_t k = 0; k <= j; ++k) sum += L[i * n + k] * L[j * n + k];
      worst = std::max(worst, std::abs(sum));
    }
  return info == 0 && worst < 1e-12;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "all";
  const int left_out = argc > 2 ? std::atoi(argv[2]) : -1;
  bool right = true;
  if (what != "factor") right = product<Narrow>(left_out) && (left_out >= 0 || product<Wide>(left_out));
  if (what != "product") right = factor(left_out) && right;
  std::printf("%s\n", right ? "right" : "wrong");
  return right || left_out >= 0 ? 0 : 1;
}
