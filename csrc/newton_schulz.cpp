// Muon's orthogonalisation, every matrix by itself; see dsfast/ops/newton_schulz.py.
#include <cmath>

#include "kernels.h"
#include "linear.h"
#include "parallel.h"

namespace DSFAST_ISA {
namespace {

constexpr int64_t SQUARES = 1024;  // numbers whose squares are summed in float32
constexpr int64_t TERMS = 64;      // of X X^T, likewise: sums of squares do not cancel, and a long chain shows

float norm(const float* x, int64_t size) {
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

// x and out [R, C]
void orthogonalise(const float* x, float* out, int64_t R, int64_t C, float a, float b, float c, float eps,
                   int64_t iterations) {
  const int64_t row = padded(C), short_row = padded(R);
  float* now = dsfast::scratch(2 * R * (row + short_row));
  float *next = now + R * row, *gram = next + R * row, *poly = gram + R * short_row;
  const float size = norm(x, R * C), divisor = size < eps ? eps : size;  // of NaN it is NaN
  for_rows(R, C, x, C, now, row, [&](vfloat v) { return v / divisor; });
  for (int64_t k = 1; k <= iterations; ++k) {
    for (int64_t i = 0; i < C; i += TERMS)
      gemm(R, R, least(C - i, TERMS), {now + i, row, 1}, {now + i, 1, row}, gram, short_row, i > 0);
    gemm(R, R, R, {gram, short_row, 1}, {gram, short_row, 1}, poly, short_row);
    for (int64_t r = 0; r < R; ++r)
      for_vectors(R, [&](int64_t i, int64_t n) {
        const int64_t at = r * short_row + i;
        store_n(poly + at, b * load_n(gram + at, n) + c * load_n(poly + at, n), n);
      });
    float* to = k < iterations ? next : out;
    const int64_t to_row = k < iterations ? row : C;
    for_rows(R, C, now, row, to, to_row, [&](vfloat v) { return v * a; });
    gemm(R, C, R, {poly, short_row, 1}, {now, row, 1}, to, to_row, true);
    next = now;
    now = to;
  }
}

}  // namespace

void newton_schulz(const float* x, float* out, const int64_t* shapes, int64_t stacks, float a, float b, float c,
                   float eps, int64_t iterations, int threads) {
  int64_t matrices = 0;
  for (int64_t s = 0; s < stacks; ++s) matrices += shapes[3 * s];
  parallel_tasks(matrices, threads, [&](int64_t i) {
    const int64_t* shape = shapes;
    int64_t begin = 0;
    for (; i >= shape[0]; i -= shape[0], shape += 3) begin += shape[0] * shape[1] * shape[2];
    begin += i * shape[1] * shape[2];
    orthogonalise(x + begin, out + begin, shape[1], shape[2], a, b, c, eps, iterations);
  });
}

}  // namespace DSFAST_ISA
