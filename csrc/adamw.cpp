// One pass over all parameters; see dsfast/ops/adamw.py.
#include <cmath>

#include "kernels.h"
#include "parallel.h"

namespace DSFAST_ISA {
namespace {

constexpr int64_t CHUNK = 16384;  // elements of one task
constexpr int LANES = 16;         // sums side by side: an addition takes as long as several that do not wait for it

// f(chunk, tensor, begin, count) for every chunk of every tensor, shared among the threads.
template <class F>
void for_chunks(const int64_t* sizes, int64_t tensors, int threads, F f) {
  int64_t chunks = 0;
  for (int64_t t = 0; t < tensors; ++t) chunks += (sizes[t] + CHUNK - 1) / CHUNK;
  parallel_ranges(chunks, threads, [&](int, int64_t first, int64_t last) {
    int64_t chunk = 0;
    for (int64_t t = 0; t < tensors; ++t)
      for (int64_t begin = 0; begin < sizes[t]; begin += CHUNK, ++chunk)
        if (chunk >= first && chunk < last) f(chunk, t, begin, least(sizes[t] - begin, CHUNK));
  });
}

}  // namespace

void adamw(float* const* params, const float* const* grads, float* const* exp_avgs, float* const* exp_avg_sqs,
           const int64_t* sizes, const double* lrs, const double* weight_decays, int64_t tensors, double beta1,
           double beta2, double eps, double correction1, double correction2, double clip_scale, int threads) {
  for_chunks(sizes, tensors, threads, [&](int64_t, int64_t t, int64_t begin, int64_t count) {
    float* __restrict p = params[t] + begin;
    const float* __restrict grad = grads[t] + begin;
    float* __restrict m = exp_avgs[t] + begin;
    float* __restrict v = exp_avg_sqs[t] + begin;
    const float keep = float(1 - lrs[t] * weight_decays[t]), rate = float(lrs[t] / correction1);
    const float b1 = float(beta1), b2 = float(beta2), g1 = float(1 - beta1), g2 = float(1 - beta2);
    const float root = float(1 / std::sqrt(correction2)), e = float(eps), clip = float(clip_scale);
    for (int64_t i = 0; i < count; ++i) {
      const float g = grad[i] * clip;
      m[i] = b1 * m[i] + g1 * g;
      v[i] = b2 * v[i] + g2 * g * g;
      p[i] = p[i] * keep - rate * m[i] / (std::sqrt(v[i]) * root + e);
    }
  });
}

double grad_norm(const float* const* grads, const int64_t* sizes, int64_t tensors, int threads) {
  double squares = 0;
  int64_t chunks = 0;
  for (int64_t t = 0; t < tensors; ++t) chunks += (sizes[t] + CHUNK - 1) / CHUNK;
  // A double for each chunk, added up in their order: the same bits with any number of threads.
  double* parts = reinterpret_cast<double*>(dsfast::scratch(2 * chunks));
  for_chunks(sizes, tensors, threads, [&](int64_t chunk, int64_t t, int64_t begin, int64_t count) {
    const float* grad = grads[t] + begin;
    double lanes[LANES] = {};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
      for (int j = 0; j < LANES; ++j) lanes[j] += double(grad[i + j]) * double(grad[i + j]);
    for (; i < count; ++i) lanes[0] += double(grad[i]) * double(grad[i]);
    for (int half = LANES / 2; half > 0; half /= 2)
      for (int j = 0; j < half; ++j) lanes[j] += lanes[j + half];
    parts[chunk] = lanes[0];
  });
  for (int64_t c = 0; c < chunks; ++c) squares += parts[c];
  return std::sqrt(squares);
}

}  // namespace DSFAST_ISA
