// Sigmoid scores, group-limited top-k, weights, counts; see dsfast/ops/moe_route.py.
#include "kernels.h"
#include "parallel.h"
#include "route.h"

namespace DSFAST_ISA {
namespace {

constexpr int64_t BLOCK = 64;  // tokens whose scores are made together: a token alone may not fill a vector

void sigmoids(const float* logits, int64_t E, float* scores) {
  for_vectors(E, [&](int64_t e, int64_t n) { store_n(scores + e, sigmoid(load_n(logits + e, n)), n); });
}

}  // namespace

void moe_route_forward(const float* logits, const float* bias, float* weights, int64_t* indices, int64_t* counts,
                       int64_t N, int64_t E, int64_t K, int64_t n_group, int64_t topk_group, bool norm_topk_prob,
                       float scaling, int threads) {
  const Choice z = {E, K, n_group, topk_group, norm_topk_prob, scaling};
  parallel_ranges(N, threads, [&](int, int64_t begin, int64_t end) {
    float *biased = dsfast::scratch(z.memory() + BLOCK * E), *block = biased + z.memory();
    for (int64_t n = begin; n < end; ++n) {
      const float* scores = block + (n - begin) % BLOCK * E;
      if ((n - begin) % BLOCK == 0) sigmoids(logits + n * E, (least(end - n, BLOCK)) * E, block);
      route_token(z, scores, bias, weights + n * K, indices + n * K, biased);
    }
  });
  for (int64_t e = 0; e < E; ++e) counts[e] = 0;
  for (int64_t i = 0; i < N * K; ++i) ++counts[indices[i]];
}

// With s the chosen scores, T their sum:  w = scaling s / T gives ds = scaling (dw - sum(dw s) / T) / T.
void moe_route_backward(const float* dweights, int64_t dweights_row, const float* logits, const int64_t* indices,
                        float* dlogits, int64_t N, int64_t E, int64_t K, bool norm_topk_prob, float scaling,
                        int threads) {
  parallel_ranges(N, threads, [&](int, int64_t begin, int64_t end) {
    float* block = dsfast::scratch(BLOCK * E);
    for (int64_t n = begin; n < end; ++n) {
      const float* scores = block + (n - begin) % BLOCK * E;
      if ((n - begin) % BLOCK == 0) sigmoids(logits + n * E, (least(end - n, BLOCK)) * E, block);
      const float* dw = dweights + n * dweights_row;
      const int64_t* chosen = indices + n * K;
      float total = 0, product = 0;
      for (int64_t k = 0; k < K; ++k) {
        total += scores[chosen[k]];
        product += dw[k] * scores[chosen[k]];
      }
      total += 1e-20f;
      for (int64_t e = 0; e < E; ++e) dlogits[n * E + e] = 0.0f;
      for (int64_t k = 0; k < K; ++k) {
        const float s = scores[chosen[k]];
        const float ds = norm_topk_prob ? (dw[k] - product / total) / total : dw[k];
        dlogits[n * E + chosen[k]] = scaling * ds * s * (1.0f - s);
      }
    }
  });
}

}  // namespace DSFAST_ISA
