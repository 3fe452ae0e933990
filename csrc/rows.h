// Products of a few rows, a token in each, with weights packed beforehand (`Packed` in gemm.h): one stream of memory,
// read once for up to MR rows. Every sum is added in the same order whatever rows share the product: a token's results
// are the same bits alone and in a batch.
#pragma once
#include "gemm.h"

namespace DSFAST_ISA {

// Terms summed in a row before they are added to the rest: long sums would otherwise round more than those of PyTorch,
// whose products of a vector add up several sums side by side.
constexpr int64_t TERMS = 128;

// Some of the columns for ROWS rows. The fewer rows, the more panels at a time: else the sums would wait for each
// other.
template <int ROWS>
__attribute__((noinline)) void rows_product(int64_t K, int64_t columns, Matrix a, const float* b, int64_t panel,
                                            float* c, int64_t ldc, bool accumulate) {
  constexpr int TOGETHER = ROWS == 1 ? 4 : ROWS <= 3 ? 2 : 1;
  int64_t j = 0;
  for (; j + TOGETHER * NR <= columns; j += TOGETHER * NR, b += TOGETHER * panel)
    tile<ROWS, 2 * TOGETHER>(K, a, b, NR, c + j, ldc, accumulate, panel);
  if constexpr (TOGETHER > 1)
    for (; j + NR <= columns; j += NR, b += panel) tile<ROWS, 2>(K, a, b, NR, c + j, ldc, accumulate);
  if (j + W <= columns) {
    tile<ROWS, 1>(K, a, b, NR, c + j, ldc, accumulate);
    j += W;
    b += W;
  }
  if (j < columns) tile_part<ROWS, true>(K, columns - j, a, b, NR, c + j, ldc, accumulate);
}

// f(Rows<rows>), 1 <= rows <= MOST.
template <int MOST = MR, class F>
DSFAST_INLINE void with_rows(int64_t rows, const F& f) {
  if constexpr (MOST > 1)
    if (rows < MOST) return with_rows<MOST - 1>(rows, f);
  f(Rows<MOST>{});
}

// c [M][N] = a b, or added to it; the rows of a, of K floats, are contiguous. They are taken MR at a time or, shared
// out evenly, fewer, and meet as many columns of b as stay in the second-level cache.
inline void product(int64_t M, Matrix a, Packed<float> b, float* c, int64_t ldc, bool accumulate = false) {
  const int64_t blocks = (M + MR - 1) / MR;
  for (int64_t k = 0; k < b.K || k == 0; k += TERMS) {
    const int64_t terms = least(b.K - k, TERMS), columns = columns_at_once(terms);
    for (int64_t j = 0; j < b.N; j += columns)
      for (int64_t block = 0, i = 0, rows; block < blocks; ++block, i += rows) {
        rows = (M - i) / (blocks - block);
        with_rows(rows, [&](auto count) {
          rows_product<count.value>(terms, least(b.N - j, columns), a.rows_from(i).columns_from(k),
                                    b.rows(k, terms).columns_from(j).terms, b.panel, c + i * ldc + j, ldc,
                                    accumulate || k > 0);
        });
      }
  }
}

}  // namespace DSFAST_ISA
