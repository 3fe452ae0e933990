// Activations kept transposed, [width][lanes] with a token in each lane: every weight is then read as it lies in memory
// and what is done to each token needs no work across lanes. lanes is 1 (a single token), W or NR. A token's sums are
// added in the same order whatever it shares the block with: its results are the same bits alone and in a batch.
#pragma once
#include <cmath>

#include "gemm.h"

namespace DSFAST_ISA {

DSFAST_INLINE int64_t lanes_for(int64_t tokens) { return tokens == 1 ? 1 : tokens <= W ? W : NR; }

// Terms summed in a row before they are added to the rest: one token's long sums would otherwise round more than those
// of PyTorch, whose products of a vector add up several sums side by side.
constexpr int64_t TERMS = 128;

// C of one vector's width: twice the rows of `gemm`'s tiles, whose 6 sums would wait for each other.
__attribute__((noinline)) inline void gemm_of_one_vector(int64_t M, int64_t K, Matrix a, const float* b, int64_t ldb,
                                                         float* c, int64_t ldc, bool accumulate) {
  int64_t i = 0;
  for (; i + 2 * MR <= M; i += 2 * MR) tile<2 * MR, 1>(K, a.rows_from(i), b, ldb, c + i * ldc, ldc, accumulate);
  for_row_blocks(M - i, [&](auto rows, int64_t row) {
    tile<rows.value, 1>(K, a.rows_from(i + row), b, ldb, c + (i + row) * ldc, ldc, accumulate);
  });
}

inline void gemm_in_parts(int64_t M, int64_t N, int64_t K, Matrix a, const float* b, int64_t ldb, float* c, int64_t ldc,
                          bool accumulate = false) {
  for (int64_t k = 0; k < K || k == 0; k += TERMS) {
    const int64_t terms = least(K - k, TERMS);
    if (N == W)
      gemm_of_one_vector(M, terms, a.columns_from(k), b + k * ldb, ldb, c, ldc, accumulate || k > 0);
    else
      gemm(M, N, terms, a.columns_from(k), {b + k * ldb, ldb, 1}, c, ldc, accumulate || k > 0);
  }
}

// y[GROUPS W] = w x, the rows of w in the lanes, `row` elements apart.
template <int GROUPS>
DSFAST_INLINE void rows_in_lanes(int64_t K, const float* w, int64_t row, const float* x, float* y, bool accumulate) {
  vfloat sums[GROUPS];
  for (int g = 0; g < GROUPS; ++g) sums[g] = vfloat{};
  int64_t k = 0;
  for (; k + W <= K; k += W)
    for (int g = 0; g < GROUPS; ++g) {
      vfloat columns[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) columns[i] = load(w + (g * W + i) * row + k);
      transpose(columns);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) sums[g] += splat(x[k + i]) * columns[column(i)];
    }
  for (; k < K; ++k)
    for (int g = 0; g < GROUPS; ++g) {
      vfloat column = {};
      for (int i = 0; i < W; ++i) column[i] = w[(g * W + i) * row + k];
      sums[g] += splat(x[k]) * column;
    }
  for (int g = 0; g < GROUPS; ++g) store(y + g * W, accumulate ? load(y + g * W) + sums[g] : sums[g]);
}

// y [M] = w x for one token: the terms of each sum in the order of `gemm_in_parts`.
__attribute__((noinline)) inline void product_of_one(int64_t M, int64_t K, const float* w, const float* x, float* y) {
  for (int64_t from = 0; from < K || from == 0; from += TERMS) {
    const int64_t terms = least(K - from, TERMS);
    const bool accumulate = from > 0;
    const float *part = w + from, *in = x + from;
    int64_t m = 0;
    for (; m + 4 * W <= M; m += 4 * W) rows_in_lanes<4>(terms, part + m * K, K, in, y + m, accumulate);
    for (; m + W <= M; m += W) rows_in_lanes<1>(terms, part + m * K, K, in, y + m, accumulate);
    for (; m < M; ++m) {
      vfloat total = {};  // in the first lane: in a float alone the compiler rounds each product by itself
      for (int64_t k = 0; k < terms; ++k) total += splat(in[k]) * load_part(part + m * K + k, 1);
      y[m] = accumulate ? y[m] + total[0] : total[0];
    }
  }
}

// y [M] = w^T x for one token, w [K, M]; the terms in the same order again.
__attribute__((noinline)) inline void product_of_one_transposed(int64_t M, int64_t K, const float* w, const float* x,
                                                                float* y) {
  for (int64_t k = 0; k < K || k == 0; k += TERMS) {
    const int64_t terms = least(K - k, TERMS);
    const Matrix in = {x + k, K, 1};
    const float* part = w + k * M;
    int64_t m = 0;
    for (; m + 4 * W <= M; m += 4 * W) tile<1, 4>(terms, in, part + m, M, y + m, M, k > 0);
    for (; m + W <= M; m += W) tile<1, 1>(terms, in, part + m, M, y + m, M, k > 0);
    if (m < M) tile_part<1, false>(terms, M - m, in, part + m, M, y + m, M, k > 0);
  }
}

// y [M][lanes] = w x, w [M, K], x [K][lanes]
inline void product(int64_t M, int64_t K, const float* w, const float* x, float* y, int64_t lanes) {
  if (lanes == 1)
    product_of_one(M, K, w, x, y);
  else
    gemm_in_parts(M, lanes, K, {w, K, 1}, x, lanes, y, lanes);
}

// y [M][lanes] = w^T x, w [K, M], x [K][lanes]
inline void product_transposed(int64_t M, int64_t K, const float* w, const float* x, float* y, int64_t lanes) {
  if (lanes == 1)
    product_of_one_transposed(M, K, w, x, y);
  else
    gemm_in_parts(M, lanes, K, {w, 1, M}, x, lanes, y, lanes);
}

// A token's vector [width] to its lane, and back.
DSFAST_INLINE void put_lane(const float* x, int64_t width, float* block, int64_t lanes, int64_t lane) {
  for (int64_t d = 0; d < width; ++d) block[d * lanes + lane] = x[d];
}
DSFAST_INLINE void take_lane(const float* block, int64_t lanes, int64_t lane, int64_t width, float* x) {
  for (int64_t d = 0; d < width; ++d) x[d] = block[d * lanes + lane];
}

DSFAST_INLINE float rms_scale(float squares, int64_t width, float eps) {
  return 1.0f / std::sqrt(squares / float(width) + eps);
}

// y = x / sqrt(mean(x^2) + eps) * weight over the width; y may be x.
inline void rms_norm_lanes(int64_t width, const float* weight, float eps, const float* x, float* y, int64_t lanes) {
  if (lanes == 1) {
    vfloat squares = {};  // in the first lane, as in `product_of_one`
    for (int64_t d = 0; d < width; ++d) squares += load_part(x + d, 1) * load_part(x + d, 1);
    const float scale = rms_scale(squares[0], width, eps);
    for (int64_t d = 0; d < width; ++d) y[d] = x[d] * scale * weight[d];
    return;
  }
  for (int64_t lane = 0; lane < lanes; lane += W) {
    vfloat squares = {}, scale;
    for (int64_t d = 0; d < width; ++d) squares += load(x + d * lanes + lane) * load(x + d * lanes + lane);
    for (int i = 0; i < W; ++i) scale[i] = rms_scale(squares[i], width, eps);
    for (int64_t d = 0; d < width; ++d)
      store(y + d * lanes + lane, load(x + d * lanes + lane) * scale * splat(weight[d]));
  }
}

}  // namespace DSFAST_ISA
