// Scores, group-limited top-k, weights, counts, the slots sorted by expert; see dsfast/ops/moe_route.py.
#include "kernels.h"
#include "parallel.h"
#include "route.h"

namespace DSFAST_ISA {
namespace {

constexpr int64_t BLOCK = 64;  // tokens of the backward pass worked on at a time

// The gradient of the logits of up to W tokens, one in each lane: with s all scores and ds those of the chosen (0 of
// the others), s (ds - sum(ds s)).
void softmax_backward(const float* dweights, int64_t dweights_row, const float* logits, const int64_t* chosen,
                      float* dlogits, int64_t count, int64_t E, int64_t K, bool norm_topk_prob, float scaling,
                      float* memory) {
  float *scores = memory, *turned = scores + E * W, *s = turned + E * W, *d = s + K * W;  // s and d: of the chosen
  int32_t* at = reinterpret_cast<int32_t*>(d + K * W);
  scores_of(logits, count, E, true, scores, turned);
  vfloat total = {}, product = {}, mean = {};
  for (int64_t k = 0; k < K; ++k) {
    vfloat dw = {};
    vint of_lane = {};
    for (int64_t i = 0; i < count; ++i) {
      of_lane[i] = int32_t(chosen[i * K + k]);
      dw[i] = dweights[i * dweights_row + k];
    }
    const vfloat score = pick(of_lane, scores, E);
    store(at + k * W, of_lane);
    store(s + k * W, score);
    store(d + k * W, dw);
    total += score;
    product += dw * score;
  }
  total += 1e-20f;
  for (int64_t k = 0; k < K; ++k) {
    const vfloat dw = load(d + k * W), ds = norm_topk_prob ? (dw - product / total) / total : dw;
    const vfloat part = scaling * ds * load(s + k * W);
    store(d + k * W, part);
    mean += part;
  }
  for (int64_t e = 0; e < E; ++e) store(scores + e * W, vfloat{} - mean * load(scores + e * W));
  to_rows(scores, E, count, dlogits);
  for (int64_t k = 0; k < K; ++k)
    for (int64_t i = 0; i < count; ++i) dlogits[i * E + at[k * W + i]] += d[k * W + i];
}

}  // namespace

// A counting sort.
int64_t sort_slots(const int64_t* indices, int64_t slots, int64_t E, int32_t* order, int32_t* offsets) {
  int64_t bad = 0;
  for (int64_t e = 0; e <= E; ++e) offsets[e] = 0;
  for (int64_t s = 0; s < slots; ++s) {
    if (indices[s] < 0 || indices[s] >= E)
      ++bad;
    else
      ++offsets[indices[s] + 1];
  }
  if (bad != 0) return bad;
  for (int64_t e = 0; e < E; ++e) offsets[e + 1] += offsets[e];
  for (int64_t s = 0; s < slots; ++s) order[offsets[indices[s]]++] = int32_t(s);
  for (int64_t e = E; e > 0; --e) offsets[e] = offsets[e - 1];  // each had moved to its end
  offsets[0] = 0;
  return 0;
}

void moe_route_forward(const float* logits, const float* bias, float* weights, int64_t* indices, int64_t* counts,
                       int32_t* order, int32_t* offsets, int64_t N, int64_t E, int64_t K, int64_t n_group,
                       int64_t topk_group, bool norm_topk_prob, bool softmax, float scaling, int threads) {
  const Choice z = {E, K, n_group, topk_group, norm_topk_prob, softmax, scaling};
  parallel_ranges(N, threads, [&](int, int64_t begin, int64_t end) {
    route_rows(z, logits + begin * E, bias, end - begin, weights + begin * K, indices + begin * K,
               dsfast::scratch(z.memory()));
  });
  sort_slots(indices, N * K, E, order, offsets);
  for (int64_t e = 0; e < E; ++e) counts[e] = offsets[e + 1] - offsets[e];
}

// With s the chosen scores, T their sum:  w = scaling s / T gives ds = scaling (dw - sum(dw s) / T) / T.
void moe_route_backward(const float* dweights, int64_t dweights_row, const float* logits, const int64_t* indices,
                        float* dlogits, int64_t N, int64_t E, int64_t K, bool norm_topk_prob, bool softmax,
                        float scaling, int threads) {
  if (softmax) {
    parallel_ranges(N, threads, [&](int, int64_t begin, int64_t end) {
      float* memory = dsfast::scratch((2 * E + 3 * K) * W);
      for (int64_t n = begin; n < end; n += W)
        softmax_backward(dweights + n * dweights_row, dweights_row, logits + n * E, indices + n * K, dlogits + n * E,
                         least(end - n, W), E, K, norm_topk_prob, scaling, memory);
    });
    return;
  }
  parallel_ranges(N, threads, [&](int, int64_t begin, int64_t end) {
    float *s = dsfast::scratch(2 * K * BLOCK), *d = s + K * BLOCK;  // [K][BLOCK]; d: of the weights, then the logits
    for (int64_t n = begin; n < end; n += BLOCK) {
      const int64_t count = least(end - n, BLOCK);
      const int64_t* chosen = indices + n * K;
      float* out = dlogits + n * E;
      for (int64_t k = 0; k < K; ++k)
        for (int64_t i = 0; i < count; ++i) {
          s[k * BLOCK + i] = logits[(n + i) * E + chosen[i * K + k]];
          d[k * BLOCK + i] = dweights[(n + i) * dweights_row + k];
        }
      for (int64_t i = 0; i < count; i += W) {
        vfloat total = {}, product = {};
        for (int64_t k = i; k < K * BLOCK; k += BLOCK) {
          const vfloat score = sigmoid(load(s + k));
          store(s + k, score);
          total += score;
          product += load(d + k) * score;
        }
        total += 1e-20f;
        for (int64_t k = i; k < K * BLOCK; k += BLOCK) {
          const vfloat score = load(s + k), dw = load(d + k);
          const vfloat ds = norm_topk_prob ? (dw - product / total) / total : dw;
          store(d + k, scaling * ds * score * (1.0f - score));
        }
      }
      clear(out, count * E);
      for (int64_t k = 0; k < K; ++k)
        for (int64_t i = 0; i < count; ++i) out[i * E + chosen[i * K + k]] = d[k * BLOCK + i];
    }
  });
}

}  // namespace DSFAST_ISA
