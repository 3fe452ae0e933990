// y = x w^T, as PyTorch's linear layers keep w: [O, D]; and its derivative.
#pragma once
#include "carver.h"
#include "gemm.h"

namespace DSFAST_ISA {

// A row length of at least `width` floats and an odd number of cache lines: rows a power of two apart share few sets of
// the first-level cache, and a product that goes down a column throws out what it has just read.
DSFAST_INLINE int64_t padded(int64_t width) { return ((width + LINE - 1) / LINE | 1) * LINE; }

// `copies` weights [O, D], one after the other, and their transposes, copied to padded rows.
struct Weight {
  float *w, *w_t;
  int64_t O, D;
  const float* from;
  int64_t copies;
  int64_t row() const { return padded(D); }
  int64_t row_t() const { return padded(O); }
  int64_t size() const { return O * row(); }
  int64_t transposed_size() const { return D * row_t(); }
  void fill() const {
    for (int64_t c = 0; c < copies; ++c) {
      float *rows = w + c * size(), *columns = w_t + c * transposed_size();
      for (int64_t o = 0; o < O; ++o)
        for (int64_t d = 0; d < D; ++d) columns[d * row_t() + o] = rows[o * row() + d] = from[(c * O + o) * D + d];
    }
  }
};

// x [N, D] -> y [N, O]
DSFAST_INLINE void linear(int64_t N, const Weight& w, const float* x, int64_t x_row, float* y, int64_t y_row,
                          Product product = gemm) {
  product(N, w.O, w.D, {x, x_row, 1}, {w.w_t, w.row_t(), 1}, y, y_row, false);
}

// dw [O, D] is added to, dx [N, D] too if `add`.
DSFAST_INLINE void linear_backward(int64_t N, const Weight& w, const float* dy, int64_t dy_row, const float* x,
                                   int64_t x_row, float* dx, int64_t dx_row, float* dw, bool add = false,
                                   Product product = gemm) {
  product(N, w.D, w.O, {dy, dy_row, 1}, {w.w, w.row(), 1}, dx, dx_row, add);
  product(w.O, w.D, N, {dy, 1, dy_row}, {x, x_row, 1}, dw, w.D, true);
}

}  // namespace DSFAST_ISA
