// Sigmoid scores, group-limited top-k, weights, counts; see dsfast/ops/moe_route.py.
#include <cmath>

#include "kernels.h"
#include "parallel.h"

namespace DSFAST_ISA {
namespace {

constexpr int64_t BLOCK = 64;  // tokens whose scores are made together: a token alone may not fill a vector

void sigmoids(const float* logits, int64_t E, float* scores) {
  for_vectors(E, [&](int64_t e, int64_t n) { store_n(scores + e, sigmoid(load_n(logits + e, n)), n); });
}

// NaN counts as the largest, as in a sort: a broken router shows in the weights.
bool larger(float a, float b) { return !(a <= b) && b == b; }

// The index of the largest value, the lowest of equals.
int64_t best(const float* values, int64_t count) {
  int64_t at = 0;
  for (int64_t i = 1; i < count; ++i)
    if (larger(values[i], values[at])) at = i;
  return at;
}

// Sets the values outside the topk_group best groups to -inf. `group` is working memory [n_group].
void limit_groups(float* values, int64_t E, int64_t n_group, int64_t topk_group, float* group) {
  const int64_t size = E / n_group;
  for (int64_t g = 0; g < n_group; ++g) {
    float first = -INFINITY, second = -INFINITY;
    for (int64_t i = 0; i < size; ++i) {
      const float value = values[g * size + i];
      if (larger(value, first)) {
        second = first;
        first = value;
      } else if (larger(value, second)) {
        second = value;
      }
    }
    group[g] = size > 1 ? first + second : first;
  }
  for (int64_t k = 0; k < topk_group; ++k) group[best(group, n_group)] = -INFINITY;
  for (int64_t g = 0; g < n_group; ++g)
    if (group[g] != -INFINITY)
      for (int64_t i = 0; i < size; ++i) values[g * size + i] = -INFINITY;
}

}  // namespace

void moe_route_forward(const float* logits, const float* bias, float* weights, int64_t* indices, int64_t* counts,
                       int64_t N, int64_t E, int64_t K, int64_t n_group, int64_t topk_group, bool norm_topk_prob,
                       float scaling, int threads) {
  parallel_ranges(N, threads, [&](int, int64_t begin, int64_t end) {
    float *biased = dsfast::scratch((BLOCK + 1) * E + n_group), *group = biased + E, *block = group + n_group;
    for (int64_t n = begin; n < end; ++n) {
      const float* scores = block + (n - begin) % BLOCK * E;
      if ((n - begin) % BLOCK == 0) sigmoids(logits + n * E, (least(end - n, BLOCK)) * E, block);
      for (int64_t e = 0; e < E; ++e) biased[e] = scores[e] + bias[e];
      if (topk_group < n_group) limit_groups(biased, E, n_group, topk_group, group);
      float total = 0;
      for (int64_t k = 0; k < K; ++k) {
        const int64_t e = indices[n * K + k] = best(biased, E);
        biased[e] = -INFINITY;
        weights[n * K + k] = scores[e];
        total += scores[e];
      }
      const float factor = norm_topk_prob ? scaling / (total + 1e-20f) : scaling;
      for (int64_t k = 0; k < K; ++k) weights[n * K + k] *= factor;
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
