// Muon's orthogonalisation of one matrix; see dsfast/ops/newton_schulz.py.
#pragma once
#include <cmath>

#include "gemm.h"
#include "linear.h"

namespace DSFAST_ISA {

constexpr int64_t SQUARES = 1024;   // numbers whose squares are summed in float32
constexpr int64_t GRAM_TERMS = 64;  // of X X^T, likewise: sums of squares do not cancel, and a long chain shows

// The polynomial a X + b X X^T X + c (X X^T)^2 X, and how often it is taken.
struct Iteration {
  float a, b, c, eps;
  int64_t times;
};

inline float norm(const float* x, int64_t size) {
  double total = 0;
  for (int64_t i = 0; i < size; i += SQUARES) {
    vfloat part = {};
    for_vectors(least(size - i, SQUARES), [&](int64_t j, int64_t n) {
      const vfloat v = load_n(x + i + j, n);
      part += v * v;
    });
    total += sum(part);
  }
  return float(std::sqrt(total));
}

// y = f(x) for R rows of C numbers, each row by itself.
template <class F>
DSFAST_INLINE void for_rows(int64_t R, int64_t C, const float* x, int64_t x_row, float* y, int64_t y_row, F f) {
  for (int64_t r = 0; r < R; ++r)
    for_vectors(C, [&](int64_t i, int64_t n) { store_n(y + r * y_row + i, f(load_n(x + r * x_row + i, n)), n); });
}

inline int64_t orthogonalise_memory(int64_t R, int64_t C) { return 2 * R * (padded(C) + padded(R)); }

// x and out [R, C], which may be one; memory: orthogonalise_memory.
inline void orthogonalise(const Iteration& z, const float* x, float* out, float* memory, int64_t R, int64_t C) {
  const int64_t row = padded(C), short_row = padded(R);
  float *now = memory, *next = now + R * row, *gram = next + R * row, *poly = gram + R * short_row;
  const float size = norm(x, R * C), divisor = size < z.eps ? z.eps : size;  // of NaN it is NaN
  for_rows(R, C, x, C, now, row, [&](vfloat v) { return v / divisor; });
  for (int64_t k = 1; k <= z.times; ++k) {
    for (int64_t i = 0; i < C; i += GRAM_TERMS)
      gemm(R, R, least(C - i, GRAM_TERMS), {now + i, row, 1}, {now + i, 1, row}, gram, short_row, i > 0);
    gemm(R, R, R, {gram, short_row, 1}, {gram, short_row, 1}, poly, short_row);
    for (int64_t r = 0; r < R; ++r)
      for_vectors(R, [&](int64_t i, int64_t n) {
        const int64_t at = r * short_row + i;
        store_n(poly + at, z.b * load_n(gram + at, n) + z.c * load_n(poly + at, n), n);
      });
    float* to = k < z.times ? next : out;
    const int64_t to_row = k < z.times ? row : C;
    for_rows(R, C, now, row, to, to_row, [&](vfloat v) { return v * z.a; });
    gemm(R, C, R, {poly, short_row, 1}, {now, row, 1}, to, to_row, true);
    next = now;
    now = to;
  }
}

// Of all stacks together, shapes [stacks, 3]: n, rows, cols.
inline int64_t matrices(const int64_t* shapes, int64_t stacks) {
  int64_t found = 0;
  for (int64_t s = 0; s < stacks; ++s) found += shapes[3 * s];
  return found;
}

}  // namespace DSFAST_ISA
