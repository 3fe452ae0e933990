// The one matrix product every operator is built from, blocked in registers.
//
//   C[M, N] = A[M, K] B[K, N]        or  C += A B, the product summed first: long sums made of many calls round less
//
// A is read one element at a time and may have any strides (so A or A^T); the rows of B and C are contiguous. M rows
// are taken MR at a time, columns in panels of two vectors; the MR x 2W sums stay in registers over the whole of K.
#pragma once
#include "simd.h"

namespace DSFAST_ISA {

#if defined(__AVX512F__)
constexpr int MR = 12;  // 24 of 32 registers hold sums
#else
constexpr int MR = 6;  // 12 of 16
#endif
constexpr int NR = 2 * W;

struct Matrix {
  const float* data;
  int64_t row, column;  // strides
  DSFAST_INLINE Matrix rows_from(int64_t i) const { return {data + i * row, row, column}; }
  DSFAST_INLINE Matrix columns_from(int64_t k) const { return {data + k * column, row, column}; }
};

template <int ROWS, int VECTORS>
DSFAST_INLINE void tile(int64_t K, Matrix a, const float* b, int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  vfloat sums[ROWS][VECTORS];
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < VECTORS; ++j) sums[i][j] = vfloat{};
  const float* ak = a.data;
  for (int64_t k = 0; k < K; ++k, ak += a.column, b += ldb) {
    vfloat bk[VECTORS];
    for (int j = 0; j < VECTORS; ++j) bk[j] = load(b + j * W);
    for (int i = 0; i < ROWS; ++i) {
      const vfloat x = splat(ak[i * a.row]);
      for (int j = 0; j < VECTORS; ++j) sums[i][j] += x * bk[j];
    }
  }
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < VECTORS; ++j) {
      float* out = c + i * ldc + j * W;
      store(out, accumulate ? load(out) + sums[i][j] : sums[i][j]);
    }
}

// The last columns, fewer than a vector.
template <int ROWS>
DSFAST_INLINE void tile_part(int64_t K, int64_t n, Matrix a, const float* b, int64_t ldb, float* c, int64_t ldc,
                             bool accumulate) {
  vfloat sums[ROWS];
  for (int i = 0; i < ROWS; ++i) sums[i] = vfloat{};
  const float* ak = a.data;
  for (int64_t k = 0; k < K; ++k, ak += a.column, b += ldb) {
    const vfloat bk = load_part(b, n);
    for (int i = 0; i < ROWS; ++i) sums[i] += splat(ak[i * a.row]) * bk;
  }
  for (int i = 0; i < ROWS; ++i) store_part(c + i * ldc, accumulate ? load_part(c + i * ldc, n) + sums[i] : sums[i], n);
}

template <int ROWS>
struct Rows {
  static constexpr int value = ROWS;
};

// f(Rows<n>, i) for blocks of n rows that cover 0..M, largest first.
template <class F>
DSFAST_INLINE void for_row_blocks(int64_t M, F f) {
  int64_t i = 0;
  for (; i + MR <= M; i += MR) f(Rows<MR>{}, i);
  if (MR > 8 && i + 8 <= M) {
    f(Rows<8>{}, i);
    i += 8;
  }
  for (; i + 4 <= M; i += 4) f(Rows<4>{}, i);
  for (; i < M; ++i) f(Rows<1>{}, i);
}

__attribute__((noinline)) inline void gemm_slice(int64_t M, int64_t N, int64_t K, Matrix a, const float* b, int64_t ldb,
                                                 float* c, int64_t ldc, bool accumulate) {
  // Panels outside, rows inside: one panel of B stays in the first-level cache while A streams past.
  int64_t j = 0;
  for (; j + NR <= N; j += NR)
    for_row_blocks(M, [&](auto rows, int64_t i) {
      tile<rows.value, 2>(K, a.rows_from(i), b + j, ldb, c + i * ldc + j, ldc, accumulate);
    });
  if (j + W <= N) {
    for_row_blocks(M, [&](auto rows, int64_t i) {
      tile<rows.value, 1>(K, a.rows_from(i), b + j, ldb, c + i * ldc + j, ldc, accumulate);
    });
    j += W;
  }
  if (j < N)
    for_row_blocks(M, [&](auto rows, int64_t i) {
      tile_part<rows.value>(K, N - j, a.rows_from(i), b + j, ldb, c + i * ldc + j, ldc, accumulate);
    });
}

// Terms summed in registers before they are added to C: bounds the rounding, and B's panel in the cache.
constexpr int64_t KC = 512;
// Floats of A that meet all of B before the next rows do: with a panel of B they fit the first-level cache.
constexpr int64_t A_BLOCK = 6144;

inline void gemm(int64_t M, int64_t N, int64_t K, Matrix a, const float* b, int64_t ldb, float* c, int64_t ldc,
                 bool accumulate = false) {
  for (int64_t k = 0; k < K || k == 0; k += KC) {
    const int64_t terms = least(K - k, KC), fit = A_BLOCK / (terms + 1) / MR * MR, rows = fit > MR ? fit : MR;
    for (int64_t i = 0; i < M; i += rows)
      gemm_slice(least(M - i, rows), N, terms, a.rows_from(i).columns_from(k), b + k * ldb, ldb, c + i * ldc, ldc,
                 accumulate || k > 0);
  }
}

}  // namespace DSFAST_ISA
