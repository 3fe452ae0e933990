// Muon, every matrix by itself; see dsfast/ops/muon.py.
#include "kernels.h"
#include "orthogonalise.h"
#include "parallel.h"

namespace DSFAST_ISA {
namespace {

struct Step {
  Iteration iteration;
  float keep, momentum, rest, clip_scale;  // keep: of a parameter; rest: 1 - momentum
};

// y [cols, rows] is x [rows, cols] turned.
void turn(const float* x, float* y, int64_t rows, int64_t cols) {
  for (int64_t c = 0; c < cols; ++c)
    for (int64_t r = 0; r < rows; ++r) y[c * rows + r] = x[r * cols + c];
}

// One step of Muon for a parameter w [rows, cols], its gradient (null: zero) and its momentum.
void update_matrix(const Step& z, float* __restrict w, const float* __restrict grad, float* __restrict m, int64_t rows,
                   int64_t cols, float rate) {
  const bool tall = rows > cols;  // what is orthogonalised has its shorter side first
  const int64_t R = tall ? cols : rows, C = tall ? rows : cols, size = rows * cols;
  float* __restrict u = dsfast::scratch(2 * size + orthogonalise_memory(R, C));
  float *x = u + size, *memory = x + size;
  for (int64_t i = 0; i < size; ++i) {
    const float g = grad == nullptr ? 0 : grad[i] * z.clip_scale;
    m[i] = z.momentum * m[i] + z.rest * g;
    u[i] = z.momentum * m[i] + z.rest * g;
  }
  if (tall) {
    turn(u, x, rows, cols);
    orthogonalise(z.iteration, x, x, memory, R, C);
    turn(x, u, cols, rows);
  } else {
    orthogonalise(z.iteration, u, u, memory, R, C);
  }
  for (int64_t i = 0; i < size; ++i) w[i] = w[i] * z.keep - rate * u[i];
}

}  // namespace

void muon(float* const* params, const float* const* grads, float* const* momenta, const int64_t* shapes,
          const double* rates, int64_t tensors, double keep, double momentum, double clip_scale, float a, float b,
          float c, float eps, int64_t iterations, int threads) {
  const Step step = {{a, b, c, eps, iterations}, float(keep), float(momentum), float(1 - momentum), float(clip_scale)};
  parallel_tasks(matrices(shapes, tensors), threads, [&](int64_t i) {
    int64_t t = 0;
    for (; i >= shapes[3 * t]; ++t) i -= shapes[3 * t];
    const int64_t rows = shapes[3 * t + 1], cols = shapes[3 * t + 2], begin = i * rows * cols;
    update_matrix(step, params[t] + begin, grads[t] == nullptr ? nullptr : grads[t] + begin, momenta[t] + begin, rows,
                  cols, float(rates[t]));
  });
}

}  // namespace DSFAST_ISA
