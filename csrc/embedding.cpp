// y[n] = table[ids[n]] projection; see dsfast/ops/embedding.py.
#include "carver.h"
#include "gemm.h"
#include "kernels.h"
#include "parallel.h"
#include "pieces.h"

namespace DSFAST_ISA {
namespace {

constexpr int64_t TOKENS = 8 * MR;  // tokens worked on at a time

// The table rows of tokens first .. first + rows.
void take(const int64_t* ids, const float* table, int64_t table_row, int64_t rows, int64_t R, float* taken) {
  for (int64_t i = 0; i < rows; ++i) copy(table + ids[i] * table_row, taken + i * R, R);
}

// The tokens by word: those of word v are order[offsets[v]] .. order[offsets[v + 1]].
struct Occurrences {
  int64_t* words;  // that occur, in rising order
  int32_t *order, *offsets;
  int64_t count = 0;

  // In memory of this thread that stays until it sorts again.
  Occurrences(const int64_t* ids, int64_t N, int64_t V) {
    const int64_t most = least(N, V);
    Carver carver = {dsfast::scratch(2 * most + N + V + 6 * LINE, dsfast::WORDS)};
    words = carver.of<int64_t>(most), order = carver.of<int32_t>(N), offsets = carver.of<int32_t>(V + 1);
    if (sort_slots(ids, N, V, order, offsets) != 0) return;  // an id out of range: as if there were none
    for (int64_t v = 0; v < V; ++v)
      if (offsets[v] < offsets[v + 1]) words[count++] = v;
  }
};

// out = the sum of the rows of a word's tokens
void sum_of_word(const Occurrences& found, int64_t word, const float* dy, int64_t dy_row, int64_t width, float* out) {
  const int32_t first = found.offsets[word];
  copy(dy + found.order[first] * dy_row, out, width);
  for (int32_t i = first + 1; i < found.offsets[word + 1]; ++i) add(dy + found.order[i] * dy_row, out, width);
}

}  // namespace

void embedding_rows(const int64_t* ids, const float* table, int64_t table_row, const BuildWeight& projection, float* y,
                    float* memory, int64_t N, int64_t R, int64_t D) {
  if (projection.numbers == nullptr) return take(ids, table, table_row, N, R, y);
  for (int64_t n = 0; n < N; n += TOKENS) {
    const int64_t rows = least(N - n, TOKENS);
    take(ids + n, table, table_row, rows, R, memory);
    projection.backward(rows, {memory, R, 1}, y + n * D, D);
  }
}

void embedding_rows_backward(const float* dy, int64_t dy_row, const int64_t* ids, const float* table, int64_t table_row,
                             const BuildWeight& projection, float* taken_grad, float* dprojection, float* memory,
                             int64_t N, int64_t R, int64_t D) {
  for (int64_t n = 0; n < N; n += TOKENS) {
    const int64_t rows = least(N - n, TOKENS);
    const float* g = dy + n * dy_row;
    take(ids + n, table, table_row, rows, R, memory);
    gemm(R, D, rows, {memory, 1, R}, {g, dy_row, 1}, dprojection, D, true);
    projection.forward(rows, Matrix{g, dy_row, 1}, taken_grad + n * R, R);
  }
}

int64_t embedding_memory(int64_t R) { return TOKENS * R; }

int64_t embedding_forward(const int64_t* ids, const float* table, int64_t table_row, const float* projection, float* y,
                          int64_t N, int64_t V, int64_t R, int64_t D, int threads) {
  int64_t bad = 0;
  for (int64_t n = 0; n < N; ++n) bad += ids[n] < 0 || ids[n] >= V;
  if (bad != 0) return bad;
  const BuildWeight packed = packed_weight(projection, R, D, false);
  parallel_ranges(N, threads, [&](int, int64_t begin, int64_t end) {
    embedding_rows(ids + begin, table, table_row, packed, y + begin * D, dsfast::scratch(embedding_memory(R)),
                   end - begin, R, D);
  });
  return 0;
}

void embedding_backward(const float* dy, int64_t dy_row, const int64_t* ids, const float* table, int64_t table_row,
                        const float* projection, float* dtable, float* dprojection, int64_t N, int64_t V, int64_t R,
                        int64_t D, int threads) {
  const Occurrences found(ids, N, V);
  const BuildWeight packed = packed_weight(projection, R, D, true);
  Partials partials;
  parallel_ranges(found.count, threads, [&](int thread, int64_t begin, int64_t end) {
    if (begin == end && found.count > 0) return;
    float* dp = dsfast::scratch(projection == nullptr ? 0 : R * D + embedding_memory(R) + TOKENS * (R + D));
    float *memory = dp + R * D, *taken_grad = memory + embedding_memory(R), *sums = taken_grad + TOKENS * R;
    if (projection != nullptr) {
      partials.of[thread] = dp;
      clear(dp, R * D);
    }
    int64_t next = begin == 0 ? 0 : found.words[begin];  // the first row of dtable that is not written yet
    for (int64_t w = begin; w < end; w += TOKENS) {
      const int64_t count = least(end - w, TOKENS), *words = found.words + w;
      for (int64_t i = 0; i < count; ++i)
        sum_of_word(found, words[i], dy, dy_row, D, projection == nullptr ? dtable + words[i] * R : sums + i * D);
      if (projection != nullptr)
        embedding_rows_backward(sums, D, words, table, table_row, packed, taken_grad, dp, memory, count, R, D);
      for (int64_t i = 0; i < count; ++i) {
        clear(dtable + next * R, (words[i] - next) * R);
        if (projection != nullptr) copy(taken_grad + i * R, dtable + words[i] * R, R);
        next = words[i] + 1;
      }
    }
    clear(dtable + next * R, ((end == found.count ? V : found.words[end]) - next) * R);
  });
  if (projection != nullptr) partials.add_up(dprojection, R * D, threads);
}

}  // namespace DSFAST_ISA
