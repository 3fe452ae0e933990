// y[n] = table[ids[n]] projection; see dsfast/ops/embedding.py.
#include "gemm.h"
#include "kernels.h"
#include "parallel.h"
#include "pieces.h"

namespace DSFAST_ISA {
namespace {

constexpr int64_t TOKENS = 8 * MR;  // tokens worked on at a time

void copy(const float* from, float* to, int64_t count) {
  for_vectors(count, [&](int64_t i, int64_t n) { store_n(to + i, load_n(from + i, n), n); });
}

// The table rows of tokens first .. first + rows.
void take(const int64_t* ids, const float* table, int64_t table_row, int64_t rows, int64_t R, float* taken) {
  for (int64_t i = 0; i < rows; ++i) copy(table + ids[i] * table_row, taken + i * R, R);
}

// dtable[v] = sum of the gradients of v's tokens, in their order. Each thread owns a range of words.
void scatter(const float* taken_grad, int64_t row, const int64_t* ids, float* dtable, int64_t N, int64_t V, int64_t R,
             int threads) {
  parallel_ranges(V, threads, [&](int, int64_t begin, int64_t end) {
    clear(dtable + begin * R, (end - begin) * R);
    for (int64_t t = 0; t < N; ++t) {
      if (ids[t] < begin || ids[t] >= end) continue;
      float* out = dtable + ids[t] * R;
      for_vectors(R, [&](int64_t i, int64_t n) {
        store_n(out + i, load_n(out + i, n) + load_n(taken_grad + t * row + i, n), n);
      });
    }
  });
}

}  // namespace

void embedding_rows_backward(const float* dy, int64_t dy_row, const int64_t* ids, const float* table, int64_t table_row,
                             const float* projection_t, int64_t projection_row, float* taken_grad, float* dprojection,
                             float* memory, int64_t N, int64_t R, int64_t D) {
  for (int64_t n = 0; n < N; n += TOKENS) {
    const int64_t rows = least(N - n, TOKENS);
    const float* g = dy + n * dy_row;
    take(ids + n, table, table_row, rows, R, memory);
    gemm(R, D, rows, {memory, 1, R}, {g, dy_row, 1}, dprojection, D, true);
    gemm(rows, R, D, {g, dy_row, 1}, {projection_t, projection_row, 1}, taken_grad + n * R, R);
  }
}

int64_t embedding_memory(int64_t R) { return TOKENS * R; }

int64_t embedding_forward(const int64_t* ids, const float* table, int64_t table_row, const float* projection, float* y,
                          int64_t N, int64_t V, int64_t R, int64_t D, int threads) {
  int64_t bad = 0;
  for (int64_t n = 0; n < N; ++n) bad += ids[n] < 0 || ids[n] >= V;
  if (bad != 0) return bad;
  parallel_ranges(N, threads, [&](int, int64_t begin, int64_t end) {
    if (projection == nullptr) {
      take(ids + begin, table, table_row, end - begin, R, y + begin * D);
      return;
    }
    float* taken = dsfast::scratch(TOKENS * R);
    for (int64_t n = begin; n < end; n += TOKENS) {
      const int64_t rows = least(end - n, TOKENS);
      take(ids + n, table, table_row, rows, R, taken);
      gemm(rows, D, R, {taken, R, 1}, {projection, D, 1}, y + n * D, D);
    }
  });
  return 0;
}

void embedding_backward(const float* dy, int64_t dy_row, const int64_t* ids, const float* table, int64_t table_row,
                        const float* projection_t, float* taken_grad, float* dtable, float* dprojection, int64_t N,
                        int64_t V, int64_t R, int64_t D, int threads) {
  if (projection_t == nullptr) {
    scatter(dy, dy_row, ids, dtable, N, V, R, threads);
    return;
  }
  Partials partials;
  parallel_ranges(N, threads, [&](int thread, int64_t n, int64_t end) {
    float* dp = partials.of[thread] = dsfast::scratch(R * D + embedding_memory(R));
    clear(dp, R * D);
    embedding_rows_backward(dy + n * dy_row, dy_row, ids + n, table, table_row, projection_t, R, taken_grad + n * R, dp,
                            dp + R * D, end - n, R, D);
  });
  partials.add_up(dprojection, R * D, threads);
  scatter(taken_grad, R, ids, dtable, N, V, R, threads);
}

}  // namespace DSFAST_ISA
