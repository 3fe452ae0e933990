// One query of a sequence against its cached latents; shared by mla_decode and the decoding step. See
// dsfast/ops/mla_decode.py.
#pragma once
#include <cmath>

#include "rows.h"

namespace DSFAST_ISA {

constexpr int HEADS = W / 4;  // whose scores share a vector: four dimensions, or four keys, of each
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
  // Fours of keys.
  static int64_t places(int64_t length) { return (length + KEYS - 1) / KEYS * KEYS / 4; }
  // Floats of working memory for `attend_one` where no sequence is longer than `longest`.
  int64_t memory(int64_t longest) const { return groups() * (fours() + places(longest)) * W; }
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

// The first `count` of four floats, and zeros, in every four lanes.
DSFAST_INLINE vfloat repeat_part(const float* p, int64_t count) {
  float four[4] = {};
  for (int64_t i = 0; i < count; ++i) four[i] = p[i];
  return repeat_four(four);
}

// One part of the keys, `token` apart.
struct Part {
  const float* data;
  int64_t token, width;
};

// sums += KEYS keys times the queries, fours of the first group where q is, `group` to the next. LAST: there are
// `count` of the keys, and the last is taken for those behind it.
template <bool LAST, int GROUPS>
DSFAST_INLINE void add_part(Part part, int64_t count, const float* q, int64_t group, vfloat (&sums)[KEYS][GROUPS]) {
  const auto add_four = [&](int64_t d, auto load_key) {
    vfloat queries[GROUPS];
    for (int g = 0; g < GROUPS; ++g) queries[g] = load(q + g * group + d / 4 * W);
#pragma GCC unroll 8
    for (int i = 0; i < KEYS; ++i) {
      const vfloat key = load_key(part.data + (LAST ? least(i, count - 1) : i) * part.token + d);
      for (int g = 0; g < GROUPS; ++g) sums[i][g] += key * queries[g];
    }
  };
  int64_t d = 0;
  // Not repeat_four itself, of which GCC has no address where it does not optimise.
  for (; d + 4 <= part.width; d += 4) add_four(d, [](const float* key) { return repeat_four(key); });
  if (d < part.width) add_four(d, [&](const float* key) { return repeat_part(key, part.width - d); });
}

using Lanes = typename Count<W>::type;

// Every four lanes summed: of each of HEADS heads a sum for a, b, c and d.
DSFAST_INLINE vfloat sums_of_fours(vfloat a, vfloat b, vfloat c, vfloat d) {
  interleave(a, b, Lanes{});
  interleave(c, d, Lanes{});
  a += b, c += d;
  exchange<2>(a, c, Lanes{});
  return a + c;
}

template <int S, int... L>
DSFAST_INLINE vfloat across(vfloat x, Numbers<L...>) {
  return vfloat{x[L ^ S]...};
}
// The numbers 0 .. 3 in every four lanes.
template <int... L>
DSFAST_INLINE vint lane_of_four(Numbers<L...>) {
  return vint{(L & 3)...};
}

// scores [groups][places][W] of KEYS keys from j on, of GROUPS groups of heads from `group` on; -inf behind the last.
template <bool LAST, int GROUPS>
DSFAST_INLINE void score(const LatentAttention& z, Cached cached, const float* q, int64_t group, int64_t j,
                         float* scores) {
  vfloat sums[KEYS][GROUPS];
#pragma GCC unroll 8
  for (int i = 0; i < KEYS; ++i)
    for (int g = 0; g < GROUPS; ++g) sums[i][g] = vfloat{};
  const int64_t size = z.fours() * W;
  q += group * size;
  const int64_t count = cached.length - j;
  add_part<LAST>({cached.latent + j * z.latent_token, z.latent_token, z.R}, count, q, size, sums);
  add_part<LAST>({cached.k_rope + j * z.rope_token, z.rope_token, z.Dr}, count, q + (z.R + 3) / 4 * W, size, sums);
  for (int i = 0; i < KEYS; i += 4) {
    const vint there = lane_of_four(Lanes{}) < int32_t(count - i);
    for (int g = 0; g < GROUPS; ++g) {
      const vfloat four = sums_of_fours(sums[i][g], sums[i + 1][g], sums[i + 2][g], sums[i + 3][g]);
      store(scores + ((group + g) * z.places(cached.length) + (j + i) / 4) * W, there ? four : splat(-INFINITY));
    }
  }
}

// The scores [places][W] of a group of heads, in place.
inline void softmax_of_fours(float* scores, int64_t places) {
  vfloat high = splat(-INFINITY), total = {};
  for (int64_t j = 0; j < places * W; j += W) high = maximum(high, load(scores + j));
  high = maximum(high, across<1>(high, Lanes{}));
  high = maximum(high, across<2>(high, Lanes{}));
  for (int64_t j = 0; j < places * W; j += W) {
    const vfloat e = exp(load(scores + j) - high);
    store(scores + j, e);
    total += e;
  }
  total += across<1>(total, Lanes{});
  total += across<2>(total, Lanes{});
  const vfloat share = 1.0f / total;
  for (int64_t j = 0; j < places * W; j += W) store(scores + j, load(scores + j) * share);
}

// mixed [HEADS GROUPS][R]: dimensions r .. r + count (VECTORS vectors, or part of one) of the keys k .. end, by their
// weights [places][W] in each group; added to what is there if k > 0.
template <int GROUPS, int VECTORS>
DSFAST_INLINE void mix(const LatentAttention& z, Cached cached, const float* weights, int64_t k, int64_t end, int64_t r,
                       int64_t count, int64_t heads, float* mixed) {
  vfloat sums[GROUPS * HEADS][VECTORS];
#pragma GCC unroll 8
  for (int h = 0; h < GROUPS * HEADS; ++h)
    for (int v = 0; v < VECTORS; ++v) sums[h][v] = vfloat{};
  const int64_t group = z.places(cached.length) * W;
  for (int64_t key = k; key < end; ++key) {
    const float *latent = cached.latent + key * z.latent_token + r, *of_key = weights + key / 4 * W + key % 4;
    vfloat latents[VECTORS];
    for (int v = 0; v < VECTORS; ++v) latents[v] = VECTORS > 1 ? load(latent + v * W) : load_n(latent, count);
#pragma GCC unroll 8
    for (int h = 0; h < GROUPS * HEADS; ++h) {
      const vfloat weight = splat(of_key[h / HEADS * group + h % HEADS * 4]);
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) sums[h][v] += weight * latents[v];
    }
  }
  for (int h = 0; h < GROUPS * HEADS && h < heads; ++h)
    for (int v = 0; v < VECTORS; ++v) {
      float* out = mixed + h * z.R + r + v * W;
      const int64_t n = VECTORS > 1 ? int64_t(W) : count;
      store_n(out, k > 0 ? load_n(out, n) + sums[h][v] : sums[h][v], n);
    }
}

// All dimensions of GROUPS groups.
template <int GROUPS>
inline void mix_all(const LatentAttention& z, Cached cached, const float* weights, int64_t heads, float* mixed) {
  constexpr int VECTORS = 8 / HEADS;
  for (int64_t k = 0; k < cached.length; k += TERMS) {
    const int64_t end = least(cached.length, k + TERMS);
    int64_t r = 0;
    for (; r + VECTORS * W <= z.R; r += VECTORS * W)
      mix<GROUPS, VECTORS>(z, cached, weights, k, end, r, W, heads, mixed);
    for (; r < z.R; r += W) mix<GROUPS, 1>(z, cached, weights, k, end, r, least(z.R - r, W), heads, mixed);
  }
}

// GROUPS groups of heads from `group` on.
template <int GROUPS>
DSFAST_INLINE void attend_groups(const LatentAttention& z, Cached cached, const float* q, int64_t group, float* scores,
                                 float* mixed) {
  int64_t j = 0;
  for (; j + KEYS <= cached.length; j += KEYS) score<false, GROUPS>(z, cached, q, group, j, scores);
  if (j < cached.length) score<true, GROUPS>(z, cached, q, group, j, scores);
  const int64_t size = z.places(cached.length) * W;
  for (int g = 0; g < GROUPS; ++g) softmax_of_fours(scores + (group + g) * size, z.places(cached.length));
  mix_all<GROUPS>(z, cached, scores + group * size, z.H - group * HEADS, mixed + group * HEADS * z.R);
}

// mixed [H][R]: the softmax of the scores times the latents; zeros for an empty cache. May lie where the query does.
inline void attend_one(const LatentAttention& z, Cached cached, Query query, float* mixed, float* memory) {
  if (cached.length == 0) return clear(mixed, z.H * z.R);
  float *q = memory, *scores = q + z.groups() * z.fours() * W;
  lay_out(z, query.latent, query.latent_head, z.R, 0, q);
  lay_out(z, query.rope, query.rope_head, z.Dr, (z.R + 3) / 4, q);
  int64_t group = 0;
  for (; group + MOST_GROUPS <= z.groups(); group += MOST_GROUPS)
    attend_groups<MOST_GROUPS>(z, cached, q, group, scores, mixed);
  for (; group < z.groups(); ++group) attend_groups<1>(z, cached, q, group, scores, mixed);
}

}  // namespace DSFAST_ISA
