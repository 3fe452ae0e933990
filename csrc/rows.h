// Products of a few rows, a token in each, with weights packed beforehand (`Packed` in gemm.h): one stream of memory,
// read once for up to MR rows. Every sum is added in the same order whatever rows share the product: a token's results
// are the same bits alone and in a batch.
#pragma once
#include "gemm.h"

namespace DSFAST_ISA {

// Terms summed in a row before they are added to the rest: long sums would otherwise round more than those of PyTorch,
// whose products of a vector add up several sums side by side.
constexpr int64_t TERMS = 128;

// c [ROWS][PANELS NR] = a b, or added to it. The fewer rows, the more panels: else the sums would wait for each other.
template <int ROWS, int PANELS>
DSFAST_INLINE void tile_panels(int64_t K, Matrix a, const float* b, int64_t panel, float* c, int64_t ldc,
                               bool accumulate) {
  constexpr int VECTORS = 2 * PANELS;
  vfloat sums[ROWS * VECTORS];  // unrolled by hand: else the compiler keeps them in memory before and after the loop
#pragma GCC unroll 32
  for (int i = 0; i < ROWS * VECTORS; ++i) sums[i] = vfloat{};
  for (int64_t k = 0; k < K; ++k, b += NR) {
    vfloat columns[VECTORS];
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j) columns[j] = load(b + j / 2 * panel + j % 2 * W);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const vfloat x = splat(a.data[i * a.row + k]);
#pragma GCC unroll 8
      for (int j = 0; j < VECTORS; ++j) sums[i * VECTORS + j] += x * columns[j];
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < ROWS * VECTORS; ++i) {
    float* out = c + i / VECTORS * ldc + i % VECTORS * W;
    store(out, accumulate ? load(out) + sums[i] : sums[i]);
  }
}

// The last panel's `count` columns.
template <int ROWS>
DSFAST_INLINE void tile_end(int64_t K, int64_t count, Matrix a, const float* b, float* c, int64_t ldc,
                            bool accumulate) {
  float sums[ROWS * NR];
  if (count <= W)
    tile<ROWS, 1>(K, a, b, NR, sums, NR, false);
  else
    tile<ROWS, 2>(K, a, b, NR, sums, NR, false);
  for (int i = 0; i < ROWS; ++i)
    for (int64_t j = 0; j < count; ++j)
      c[i * ldc + j] = accumulate ? c[i * ldc + j] + sums[i * NR + j] : sums[i * NR + j];
}

// f(Rows<rows>), 1 <= rows <= MOST.
template <int MOST = MR, class F>
DSFAST_INLINE void with_rows(int64_t rows, const F& f) {
  if constexpr (MOST > 1)
    if (rows < MOST) return with_rows<MOST - 1>(rows, f);
  f(Rows<MOST>{});
}

// c [M][N] = a b, or added to it; the rows of a, of K floats, are contiguous.
__attribute__((noinline)) inline void product(int64_t M, Matrix a, Packed<float> b, float* c, int64_t ldc,
                                              bool accumulate = false) {
  const int64_t blocks = (M + MR - 1) / MR;
  for (int64_t from = 0; from < b.K || from == 0; from += TERMS, accumulate = true) {
    const int64_t terms = least(b.K - from, TERMS), together = M == 1 ? 4 : M <= 3 ? 2 : 1;
    const float* weights = b.terms + from * NR;
    for (int64_t j = 0, panels; j < b.N; j += panels * NR, weights += panels * b.panel) {
      panels = j + together * NR <= b.N ? together : 1;
      for (int64_t block = 0, i = 0, rows; block < blocks; ++block, i += rows) {
        rows = (M - i) / (blocks - block);
        with_rows(rows, [&](auto count) {
          constexpr int ROWS = count.value;
          const Matrix part = a.rows_from(i).columns_from(from);
          float* out = c + i * ldc + j;
          if (j + NR > b.N) return tile_end<ROWS>(terms, b.N - j, part, weights, out, ldc, accumulate);
          if constexpr (ROWS == 1)
            if (panels == 4) return tile_panels<1, 4>(terms, part, weights, b.panel, out, ldc, accumulate);
          if constexpr (ROWS <= 3)
            if (panels == 2) return tile_panels<ROWS, 2>(terms, part, weights, b.panel, out, ldc, accumulate);
          tile_panels<ROWS, 1>(terms, part, weights, b.panel, out, ldc, accumulate);
        });
      }
    }
  }
}

}  // namespace DSFAST_ISA
