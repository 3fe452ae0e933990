// The choice of experts for one token, shared by moe_route and the decoding step; see dsfast/ops/moe_route.py.
#pragma once
#include <cmath>

#include "simd.h"

namespace DSFAST_ISA {

// NaN counts as the largest, as in a sort: a broken router shows in the weights.
DSFAST_INLINE bool larger(float a, float b) { return !(a <= b) && b == b; }

// The index of the largest value, the lowest of equals.
inline int64_t best(const float* values, int64_t count) {
  int64_t at = 0;
  for (int64_t i = 1; i < count; ++i)
    if (larger(values[i], values[at])) at = i;
  return at;
}

// Sets the values outside the topk_group best groups to -inf. `group` is working memory [n_group].
inline void limit_groups(float* values, int64_t E, int64_t n_group, int64_t topk_group, float* group) {
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

struct Choice {
  int64_t E, K, n_group, topk_group;
  bool norm_topk_prob;
  float scaling;
  // Floats of working memory for `route_token`.
  int64_t memory() const { return E + n_group; }
};

// scores and bias [E] -> weights and indices [K], the best first
inline void route_token(const Choice& z, const float* scores, const float* bias, float* weights, int64_t* indices,
                        float* memory) {
  float* biased = memory;
  for (int64_t e = 0; e < z.E; ++e) biased[e] = scores[e] + bias[e];
  if (z.topk_group < z.n_group) limit_groups(biased, z.E, z.n_group, z.topk_group, memory + z.E);
  float total = 0;
  for (int64_t k = 0; k < z.K; ++k) {
    const int64_t e = indices[k] = best(biased, z.E);
    biased[e] = -INFINITY;
    weights[k] = scores[e];
    total += scores[e];
  }
  const float factor = z.norm_topk_prob ? z.scaling / (total + 1e-20f) : z.scaling;
  for (int64_t k = 0; k < z.K; ++k) weights[k] *= factor;
}

}  // namespace DSFAST_ISA
