// Threads of a parallel region, on the OpenMP runtime that torch brings.
#pragma once
#include <pthread.h>

#include <algorithm>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace vitlr {

inline bool& forked() {
  static bool value = false;
  return value;
}

// How many threads to ask for: no more than there are tasks, and one in a forked process. There libgomp still counts
// on threads that only its parent has: a region of several would wait for them for ever.
// `watch_forks` says so from the extension's import on: a parent may never call what its child calls first.
inline bool watch_forks() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { forked() = true; });
  return registered == 0;
}

inline int team_of(int threads, int64_t tasks) {
  if (!watch_forks() || forked()) return 1;
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, tasks)));
}

inline int thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

}  // namespace vitlr
