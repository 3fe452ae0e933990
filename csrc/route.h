// The choice of the largest: of experts for W tokens, one in each lane, shared by moe_route and the decoding step; see
// dsfast/ops/moe_route.py.
#pragma once
#include "terms.h"
#include "transpose.h"

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

// Numbers as integers of that order, so that a maximum is one instruction and NaN needs none of its own. -0 is 0.
DSFAST_INLINE vint key_of(vfloat x) {
  const vint bits = (vint)(x + 0.0f), key = bits ^ ((bits >> 31) & INT32_MAX);
  return x == x ? key : splat(INT32_MAX);
}
DSFAST_INLINE vfloat value_of(vint key) { return (vfloat)(key ^ ((key >> 31) & INT32_MAX)); }
constexpr int32_t NONE = int32_t(0x807fffff);  // the key of -inf
constexpr int32_t LEFT_OUT = NONE - 1;         // below all keys, with its group
constexpr int32_t TAKEN = INT32_MIN;           // below these: not even where all that is left is -inf taken twice

DSFAST_INLINE vint maximum(vint a, vint b) { return a > b ? a : b; }
DSFAST_INLINE vint minimum(vint a, vint b) { return a < b ? a : b; }

// `best` in each lane; keys [count][W]
DSFAST_INLINE vint best_lanes(const int32_t* keys, int64_t count) {
  vint high = load(keys), at = {};
  for (int64_t i = 1; i < count; ++i) high = maximum(high, load(keys + i * W));
  for (int64_t i = count - 1; i >= 0; --i) at = load(keys + i * W) == high ? splat(int32_t(i)) : at;
  return at;
}

// Up to so many numbers all are looked at, of more one for each lane: a vector read where a lane was just written
// waits.
constexpr int64_t FEW = 8;

// scores [count][W] -> number at[i] of lane i
DSFAST_INLINE vfloat pick(vint at, const float* scores, int64_t count) {
  vfloat picked = {};
  if (count <= FEW)
    for (int64_t e = 0; e < count; ++e) picked = at == int32_t(e) ? load(scores + e * W) : picked;
  else
    for (int64_t i = 0; i < W; ++i) picked[i] = scores[at[i] * W + i];
  return picked;
}

DSFAST_INLINE void take_out(vint at, int32_t* keys, int64_t count) {
  if (count <= FEW)
    for (int64_t e = 0; e < count; ++e) store(keys + e * W, at == int32_t(e) ? splat(TAKEN) : load(keys + e * W));
  else
    for (int i = 0; i < W; ++i) keys[at[i] * W + i] = TAKEN;
}

// Makes LEFT_OUT of the keys outside the topk_group best groups. `group` is working memory [n_group][W].
inline void limit_groups(int32_t* keys, int64_t E, int64_t n_group, int64_t topk_group, int32_t* group) {
  const int64_t size = E / n_group;
  for (int64_t g = 0; g < n_group; ++g) {
    vint first = splat(NONE), second = first;
    for (int64_t i = 0; i < size; ++i) {
      const vint key = load(keys + (g * size + i) * W);
      second = maximum(second, minimum(first, key));
      first = maximum(first, key);
    }
    store(group + g * W, size > 1 ? key_of(value_of(first) + value_of(second)) : first);
  }
  for (int64_t k = 0; k < topk_group; ++k) take_out(best_lanes(group, n_group), group, n_group);
  for (int64_t e = 0; e < E; ++e) {
    const vint kept = load(group + e / size * W) == TAKEN;
    store(keys + e * W, kept ? load(keys + e * W) : splat(LEFT_OUT));
  }
}

// Of two vectors, one behind the other, the even numbers and the odd ones.
template <int... L>
DSFAST_INLINE void unzip(vfloat& a, vfloat& b, Numbers<L...>) {
  const vfloat x = a, y = b;
  a = vfloat{(2 * L < W ? x[2 * L % W] : y[2 * L % W])...};
  b = vfloat{(2 * L < W ? x[2 * L % W + 1] : y[2 * L % W + 1])...};
}

// x [W, E] -> [E][W] for E a power of two: the even numbers first, log2 E times. Returns `to` or `memory`.
inline float* turn_small(const float* x, int64_t E, float* to, float* memory) {
  for (int64_t step = 1; step < E; step *= 2) {
    for (int64_t i = 0; i < E / 2; ++i) {
      vfloat a = load(x + 2 * i * W), b = load(x + (2 * i + 1) * W);
      unzip(a, b, typename Count<W>::type{});
      store(to + i * W, a);
      store(to + (E / 2 + i) * W, b);
    }
    x = to;
    float* other = memory;
    memory = to;
    to = other;
  }
  return memory;
}

// x [E][W] -> exp(x) over its sum, in each lane. NaN and inf make all of a lane NaN, as in PyTorch.
inline void softmax_lanes(float* x, int64_t E) {
  vfloat high = load(x), total = {};
  for (int64_t e = 1; e < E; ++e) high = maximum(high, load(x + e * W));
  for (int64_t e = 0; e < E; ++e) {
    const vfloat power = exp(load(x + e * W) - high);
    store(x + e * W, power);
    total += power;
  }
  for (int64_t e = 0; e < E; ++e) store(x + e * W, load(x + e * W) / total);
}

template <bool SOFTMAX>
DSFAST_INLINE vfloat own_score(vfloat logit) {
  return SOFTMAX ? logit : sigmoid(logit);
}

// The scores but for what softmax makes of an expert's by those of the others.
template <bool SOFTMAX>
inline void own_scores(const float* logits, int64_t count, int64_t E, float* scores, float* memory) {
  if (count == W && (E == 2 || E == 4 || E == 8)) {
    const float* turned = turn_small(logits, E, scores, memory);
    for (int64_t e = 0; e < E; ++e) store(scores + e * W, own_score<SOFTMAX>(load(turned + e * W)));
    return;
  }
  for (int64_t e = 0; e < E; e += W) {
    const int64_t experts = least(E - e, W);
    vfloat tile[W];
#pragma GCC unroll 16
    for (int64_t i = 0; i < W; ++i) tile[i] = i < count ? load_n(logits + i * E + e, experts) : vfloat{};
    transpose(tile);
#pragma GCC unroll 16
    for (int64_t i = 0; i < W; ++i)
      if (i < experts) store(scores + (e + i) * W, own_score<SOFTMAX>(tile[column(int(i))]));
  }
}

// logits [count, E] of up to W tokens -> scores [E][W]; memory [E][W]
inline void scores_of(const float* logits, int64_t count, int64_t E, bool softmax, float* scores, float* memory) {
  if (softmax) {
    own_scores<true>(logits, count, E, scores, memory);
    softmax_lanes(scores, E);
  } else {
    own_scores<false>(logits, count, E, scores, memory);
  }
}

struct Choice {
  int64_t E, K, n_group, topk_group;
  bool norm_topk_prob, softmax;
  float scaling;
  // Floats of working memory: for `route_lanes`, and for `route_rows`.
  int64_t lanes_memory() const { return (E + n_group) * W; }
  int64_t memory() const { return lanes_memory() + 2 * (E + K) * W; }
};

// scores [E][W] and bias [E] -> weights and indices [K][W], the best first
inline void route_lanes(const Choice& z, const float* scores, const float* bias, float* weights, int32_t* indices,
                        float* memory) {
  int32_t* keys = reinterpret_cast<int32_t*>(memory);
  for (int64_t e = 0; e < z.E; ++e) store(keys + e * W, key_of(load(scores + e * W) + bias[e]));
  if (z.topk_group < z.n_group) limit_groups(keys, z.E, z.n_group, z.topk_group, keys + z.E * W);
  vfloat total = {};
  for (int64_t k = 0; k < z.K; ++k) {
    const vint at = best_lanes(keys, z.E);
    if (k + 1 < z.K) take_out(at, keys, z.E);
    const vfloat score = pick(at, scores, z.E);
    total += score;
    store(indices + k * W, at);
    store(weights + k * W, score);
  }
  const vfloat factor = z.norm_topk_prob ? z.scaling / (total + 1e-20f) : splat(z.scaling);
  for (int64_t k = 0; k < z.K; ++k) store(weights + k * W, load(weights + k * W) * factor);
}

// [K][W] -> [count][K], from and to
template <class From, class To>
DSFAST_INLINE void to_rows(const From* __restrict from, int64_t K, int64_t count, To* __restrict to) {
  if (K == 1 && count == W)
    for (int i = 0; i < W; ++i) to[i] = from[i];
  else
    for (int64_t k = 0; k < K; ++k)
      for (int64_t i = 0; i < count; ++i) to[i * K + k] = from[k * W + i];
}

// logits [N, E] and bias [E] -> weights and indices [N, K], the best first
inline void route_rows(const Choice& z, const float* logits, const float* bias, int64_t N, float* weights,
                       int64_t* indices, float* memory) {
  float *scores = memory + z.lanes_memory(), *turned = scores + z.E * W, *chosen = turned + z.E * W;
  int32_t* at = reinterpret_cast<int32_t*>(chosen + z.K * W);
  for (int64_t n = 0; n < N; n += W) {
    const int64_t count = least(N - n, W);
    scores_of(logits + n * z.E, count, z.E, z.softmax, scores, turned);
    route_lanes(z, scores, bias, chosen, at, memory);
    to_rows(chosen, z.K, count, weights + n * z.K);
    to_rows(at, z.K, count, indices + n * z.K);
  }
}

}  // namespace DSFAST_ISA
