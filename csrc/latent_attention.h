// One query of a sequence against its cached latents; shared by mla_decode and the decoding step. See
// dsfast/ops/mla_decode.py.
#pragma once
#include <cmath>

#include "rows.h"

namespace DSFAST_ISA {

constexpr int HEADS = W / 4;  // whose scores share a vector: four dimensions of each
constexpr int KEYS = 8;       // scored at a time
#if defined(__AVX512F__)
constexpr int MOST_GROUPS = 2;  // of HEADS heads at a time: 16 of 32 registers hold sums
#else
constexpr int MOST_GROUPS = 1;  // 8 of 16
#endif

// The cache of one sequence: `length` tokens whose latents [R] and rope keys [Dr] lie the given strides apart.
struct Cached {
  const float *latent, *k_rope;
  int64_t length;
};

// A query's heads, [R] and [Dr] of each, the given strides apart.
struct Query {
  const float* latent;
  int64_t latent_head;
  const float* rope;
  int64_t rope_head;
};

struct LatentAttention {
  int64_t H, R, Dr;
  int64_t latent_token, rope_token;  // strides
  float scale;

  int64_t groups() const { return (H + HEADS - 1) / HEADS; }
  // Fours of dimensions, those of each part filled up.
  int64_t fours() const { return (R + 3) / 4 + (Dr + 3) / 4; }
  static int64_t places(int64_t length) {
    constexpr int64_t MULTIPLE = W > KEYS ? W : KEYS;
    return (length + MULTIPLE - 1) / MULTIPLE * MULTIPLE;
  }
  // Floats of working memory for `attend_one` where no sequence is longer than `longest`.
  int64_t memory(int64_t longest) const { return groups() * (fours() * W + HEADS * (places(longest) + 1)); }
};

// Fours of one part of all heads, scaled: out [groups][fours][W], of which this part's begin at `first`.
inline void lay_out(const LatentAttention& z, const float* part, int64_t head, int64_t width, int64_t first,
                    float* out) {
  for (int64_t h = 0; h < z.groups() * HEADS; ++h)
    for (int64_t d = 0; d < width; d += 4) {
      float* to = out + (h / HEADS * z.fours() + first + d / 4) * W + h % HEADS * 4;
      for (int64_t i = 0; i < 4; ++i) to[i] = h < z.H && d + i < width ? part[h * head + d + i] * z.scale : 0.0f;
    }
}

// The first `count` of four, and zeros, in every four lanes.
DSFAST_INLINE vfloat repeat_part(const float* p, int64_t count) {
  float four[4] = {};
  for (int64_t i = 0; i < count; ++i) four[i] = p[i];
  return repeat_four(four);
}

// sums += the dimensions of one part. q: fours of the first group.
template <int GROUPS>
DSFAST_INLINE void add_part(const float* (&keys)[KEYS], int64_t width, const float* q, int64_t group,
                            vfloat (&sums)[KEYS][GROUPS]) {
  for (int64_t d = 0; d < width; d += 4, q += W) {
    vfloat queries[GROUPS];
    for (int g = 0; g < GROUPS; ++g) queries[g] = load(q + g * group);
#pragma GCC unroll 8
    for (int i = 0; i < KEYS; ++i) {
      const vfloat key = d + 4 <= width ? repeat_four(keys[i] + d) : repeat_part(keys[i] + d, width - d);
      for (int g = 0; g < GROUPS; ++g) sums[i][g] += key * queries[g];
    }
  }
}

// Every four lanes of `keys` summed: four scores of each of HEADS heads.
DSFAST_INLINE vfloat sums_of_fours(vfloat a, vfloat b, vfloat c, vfloat d) {
  using Lanes = typename Count<W>::type;
  interleave(a, b, Lanes{});
  interleave(c, d, Lanes{});
  a += b, c += d;
  exchange<2>(a, c, Lanes{});
  return a + c;
}

// scores [H][places] of KEYS keys from j on, of GROUPS groups of heads from `group` on. Behind the last key it is
// repeated.
template <int GROUPS>
DSFAST_INLINE void score(const LatentAttention& z, Cached cached, const float* q, int64_t group, int64_t j,
                         float* scores) {
  const float *latents[KEYS], *ropes[KEYS];
  vfloat sums[KEYS][GROUPS];
  for (int i = 0; i < KEYS; ++i) {
    const int64_t key = least(j + i, cached.length - 1);
    latents[i] = cached.latent + key * z.latent_token;
    ropes[i] = cached.k_rope + key * z.rope_token;
    for (int g = 0; g < GROUPS; ++g) sums[i][g] = vfloat{};
  }
  const int64_t size = z.fours() * W;
  q += group * size;
  add_part(latents, z.R, q, size, sums);
  add_part(ropes, z.Dr, q + (z.R + 3) / 4 * W, size, sums);
  const int64_t places = z.places(cached.length);
  for (int g = 0; g < GROUPS; ++g)
    for (int i = 0; i < KEYS; i += 4) {
      float four[W];
      store(four, sums_of_fours(sums[i][g], sums[i + 1][g], sums[i + 2][g], sums[i + 3][g]));
      for (int h = 0; h < HEADS; ++h)
        __builtin_memcpy(scores + ((group + g) * HEADS + h) * places + j + i, four + 4 * h, 16);
    }
}

// Scores [places] -> their exponentials, of which the sum is returned; those behind `length` become 0.
inline float exponentials_of_row(float* scores, int64_t length, int64_t places) {
  for (int64_t j = length; j < places; ++j) scores[j] = -INFINITY;
  vfloat highest = splat(-INFINITY), total = {};
  for (int64_t j = 0; j < places; j += W) highest = maximum(highest, load(scores + j));
  float high = highest[0];
  for (int i = 1; i < W; ++i) high = highest[i] > high ? highest[i] : high;
  for (int64_t j = 0; j < places; j += W) {
    const vfloat e = exp(load(scores + j) - high);
    store(scores + j, e);
    total += e;
  }
  return sum(total);
}

// mixed [H][R]: the softmax of the scores times the latents; zeros for an empty cache. May lie where the query does.
inline void attend_one(const LatentAttention& z, Cached cached, Query query, float* mixed, float* memory) {
  const int64_t length = cached.length, places = z.places(length);
  if (length == 0) return clear(mixed, z.H * z.R);
  float *q = memory, *scores = q + z.groups() * z.fours() * W, *totals = scores + z.groups() * HEADS * places;
  lay_out(z, query.latent, query.latent_head, z.R, 0, q);
  lay_out(z, query.rope, query.rope_head, z.Dr, (z.R + 3) / 4, q);
  for (int64_t j = 0; j < length; j += KEYS) {
    int64_t group = 0;
    for (; group + MOST_GROUPS <= z.groups(); group += MOST_GROUPS) score<MOST_GROUPS>(z, cached, q, group, j, scores);
    for (; group < z.groups(); ++group) score<1>(z, cached, q, group, j, scores);
  }
  for (int64_t h = 0; h < z.H; ++h) totals[h] = exponentials_of_row(scores + h * places, length, places);
  for (int64_t k = 0; k < length; k += TERMS) {
    const float* latents = cached.latent + k * z.latent_token;
    gemm(z.H, z.R, least(length - k, TERMS), {scores + k, places, 1}, {latents, z.latent_token, 1}, mixed, z.R, k > 0);
  }
  for (int64_t h = 0; h < z.H; ++h) {
    const float share = 1.0f / totals[h];
    for_vectors(z.R,
                [&](int64_t r, int64_t n) { store_n(mixed + h * z.R + r, load_n(mixed + h * z.R + r, n) * share, n); });
  }
}

}  // namespace DSFAST_ISA
