// y = h / sqrt(mean(h^2) + eps) * weight, h = x + residual; see dsfast/ops/rms_norm.py.
#include <cmath>

#include "kernels.h"
#include "parallel.h"
#include "pieces.h"

namespace DSFAST_ISA {
namespace {

constexpr int64_t CHUNK = 64;  // tokens whose share of dweight is summed by itself first: fewer roundings

}  // namespace

// dx = rstd (dy weight - h rstd^2 mean(dy weight h)) + dh,    dweight = sum_n dy h rstd
void rms_norm_rows_backward(const float* dy, int64_t dy_row, const float* dh, int64_t dh_row, const float* h,
                            int64_t h_row, const float* weight, const float* rstd, float* dx, int64_t dx_row,
                            float* dweight, float* memory, int64_t N, int64_t D) {
  for (int64_t n = 0; n < N; ++n) {
    if (n % CHUNK == 0) clear(memory, D);
    const float *g = dy + n * dy_row, *row = h + n * h_row;
    const float r = rstd[n];
    vfloat products = {};
    for_vectors(D, [&](int64_t d, int64_t count) {
      const vfloat gh = load_n(g + d, count) * load_n(row + d, count);
      products += gh * load_n(weight + d, count);
      store_n(memory + d, load_n(memory + d, count) + gh * r, count);
    });
    const float pull = sum(products) / float(D) * r * r * r;
    for_vectors(D, [&](int64_t d, int64_t count) {
      vfloat value = load_n(g + d, count) * load_n(weight + d, count) * r - load_n(row + d, count) * pull;
      if (dh != nullptr) value += load_n(dh + n * dh_row + d, count);
      store_n(dx + n * dx_row + d, value, count);
    });
    if ((n + 1) % CHUNK == 0 || n + 1 == N) add(memory, dweight, D);
  }
}

void rms_norm_rows(const float* x, int64_t x_row, const float* residual, int64_t residual_row, const float* weight,
                   float eps, float* y, int64_t y_row, float* h, float* rstd, int64_t N, int64_t D) {
  for (int64_t n = 0; n < N; ++n) {
    const float* row = x + n * x_row;
    vfloat squares = {};
    for_vectors(D, [&](int64_t d, int64_t count) {
      vfloat value = load_n(row + d, count);
      if (residual != nullptr) {
        value += load_n(residual + n * residual_row + d, count);
        store_n(h + n * D + d, value, count);
      }
      squares += value * value;
    });
    if (residual != nullptr) row = h + n * D;
    const float r = 1.0f / std::sqrt(sum(squares) / float(D) + eps);
    rstd[n] = r;
    for_vectors(D, [&](int64_t d, int64_t count) {
      store_n(y + n * y_row + d, load_n(row + d, count) * r * load_n(weight + d, count), count);
    });
  }
}

void rms_norm_forward(const float* x, int64_t x_row, const float* residual, int64_t residual_row, const float* weight,
                      float eps, float* y, float* h, float* rstd, int64_t N, int64_t D, int threads) {
  parallel_ranges(N, threads, [&](int, int64_t n, int64_t end) {
    const float* other = residual == nullptr ? nullptr : residual + n * residual_row;
    rms_norm_rows(x + n * x_row, x_row, other, residual_row, weight, eps, y + n * D, D, h == nullptr ? h : h + n * D,
                  rstd + n, end - n, D);
  });
}

void rms_norm_backward(const float* dy, int64_t dy_row, const float* dh, int64_t dh_row, const float* h, int64_t h_row,
                       const float* weight, const float* rstd, float* dx, float* dweight, int64_t N, int64_t D,
                       int threads) {
  Partials partials;
  parallel_ranges(N, threads, [&](int thread, int64_t n, int64_t end) {
    float* total = partials.of[thread] = dsfast::scratch(2 * D);
    clear(total, D);
    const float* other = dh == nullptr ? nullptr : dh + n * dh_row;
    rms_norm_rows_backward(dy + n * dy_row, dy_row, other, dh_row, h + n * h_row, h_row, weight, rstd + n, dx + n * D,
                           D, total, total + D, end - n, D);
  });
  partials.add_up(dweight, D, 1);
}

}  // namespace DSFAST_ISA
