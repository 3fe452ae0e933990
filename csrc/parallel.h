// Few, coarse parallel regions: entering one costs microseconds on an idle machine and milliseconds on a busy one.
#pragma once
#include <omp.h>

#include <cstdint>

#include "scratch.h"
#include "simd.h"

namespace DSFAST_ISA {

constexpr int MAX_THREADS = 256;

// Whether f ends without an exception, which no thread may take out of a parallel region; there is one, bad_alloc.
template <class F>
DSFAST_INLINE bool succeeds(F f) {
  try {
    f();
    return true;
  } catch (...) {
    return false;
  }
}

// f(thread, begin, end): a contiguous part of 0..count for each thread; the split depends on `count` and the number of
// threads that run alone. Where one of them finds no memory, what is thrown is thrown behind all of them.
template <class F>
DSFAST_INLINE void parallel_ranges(int64_t count, int threads, F f) {
  if (threads <= 1 || count <= 1) {
    f(0, int64_t(0), count);
    return;
  }
  bool failed = false;
#pragma omp parallel num_threads(threads < MAX_THREADS ? threads : MAX_THREADS) reduction(|| : failed)
  {
    const int64_t t = omp_get_thread_num(), parts = omp_get_num_threads();
    failed = !succeeds([&] { f(int(t), count * t / parts, count * (t + 1) / parts); });
  }
  if (failed) dsfast::out_of_memory();
}

// f(task) for 0..count, each task to whichever thread is free: for tasks that write nothing in common. Memory as above.
template <class F>
DSFAST_INLINE void parallel_tasks(int64_t count, int threads, F f) {
  bool failed = false;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1 && count > 1) reduction(|| : failed)
  for (int64_t task = 0; task < count; ++task) failed |= !succeeds([&] { f(task); });
  if (failed) dsfast::out_of_memory();
}

// One array a thread for sums that several threads contribute to; added up in the order of the threads, so that a run
// with the same number of threads gives the same bits.
struct Partials {
  float* of[MAX_THREADS] = {};

  void add_up(float* out, int64_t count, int threads) const {
    const float* parts[MAX_THREADS];
    int used = 0;
    for (const float* part : of)
      if (part != nullptr) parts[used++] = part;
    parallel_ranges((count + 1023) / 1024, threads, [&](int, int64_t begin, int64_t end) {
      const int64_t last = end * 1024 < count ? end * 1024 : count;
      for_vectors(last - begin * 1024, [&](int64_t i, int64_t n) {
        vfloat total = {};
        for (int t = 0; t < used; ++t) total += load_n(parts[t] + begin * 1024 + i, n);
        store_n(out + begin * 1024 + i, total, n);
      });
    });
  }
};

}  // namespace DSFAST_ISA
