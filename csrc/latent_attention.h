// One query of each sequence against its cached latents, for a block of sequences in the lanes; shared by mla_decode
// and the decoding step. See dsfast/ops/mla_decode.py.
#pragma once
#include "lanes.h"
#include "softmax.h"

namespace DSFAST_ISA {

// The cache of one sequence: `length` tokens whose latents [R] and rope keys [Dr] lie the given strides apart.
struct Cached {
  const float *latent, *k_rope;
  int64_t length;
};

struct LatentAttention {
  int64_t H, R, Dn, Dr, Dv;
  int64_t latent_token, rope_token;  // strides
  float scale;

  int64_t head_lanes() const { return (H + W - 1) / W * W; }
  // Floats of working memory for `attend_block` where no sequence is longer than `longest`.
  int64_t memory(int64_t longest) const { return H * R * (NR + 1) + (R + Dr + longest + 2) * head_lanes(); }
};

// The query of one lane with the heads in the lanes, [R + Dr][head_lanes], scaled.
inline void heads_in_lanes(const LatentAttention& z, const float* q_latent, const float* q, int64_t lanes, int64_t lane,
                           float* out) {
  const int64_t heads = z.head_lanes();
  clear(out, (z.R + z.Dr) * heads);
  for (int64_t h = 0; h < z.H; ++h) {
    const float *latent = q_latent + h * z.R * lanes, *rope = q + (h * (z.Dn + z.Dr) + z.Dn) * lanes;
    for (int64_t r = 0; r < z.R; ++r) out[r * heads + h] = latent[r * lanes + lane] * z.scale;
    for (int64_t r = 0; r < z.Dr; ++r) out[(z.R + r) * heads + h] = rope[r * lanes + lane] * z.scale;
  }
}

// mixed [H][R]: the softmax of the scores times the latents. q_t [R + Dr][head_lanes]; zeros for an empty cache.
inline void attend_one(const LatentAttention& z, Cached cached, const float* q_t, float* mixed, float* memory) {
  const int64_t heads = z.head_lanes(), length = cached.length;
  float *top = memory, *total = top + heads, *scores = total + heads;
  gemm_in_parts(length, heads, z.R, {cached.latent, z.latent_token, 1}, q_t, heads, scores, heads);
  gemm_in_parts(length, heads, z.Dr, {cached.k_rope, z.rope_token, 1}, q_t + z.R * heads, heads, scores, heads, true);
  exponentials(scores, length, heads, scores, top, total);
  gemm_in_parts(z.H, z.R, length, {scores, 1, heads}, cached.latent, z.latent_token, mixed, z.R);
  for (int64_t h = 0; h < z.H && length > 0; ++h) {
    const float share = 1.0f / total[h];
    for (int64_t r = 0; r < z.R; ++r) mixed[h * z.R + r] *= share;
  }
}

// q [H (Dn + Dr)][lanes], the rope part turned; up [H, Dn + Dv, R]; cached [tokens] -> values [H Dv][lanes]. Lanes from
// `tokens` on are left undefined.
inline void attend_block(const LatentAttention& z, const float* q, const float* up, const Cached* cached,
                         int64_t tokens, int64_t lanes, float* values, float* memory) {
  float *latents = memory, *mixed = latents + z.H * z.R * lanes, *q_t = mixed + z.H * z.R;
  float* rest = q_t + (z.R + z.Dr) * z.head_lanes();
  for (int64_t h = 0; h < z.H; ++h)
    product_transposed(z.R, z.Dn, up + h * (z.Dn + z.Dv) * z.R, q + h * (z.Dn + z.Dr) * lanes,
                       latents + h * z.R * lanes, lanes);
  for (int64_t lane = 0; lane < tokens; ++lane) {
    heads_in_lanes(z, latents, q, lanes, lane, q_t);
    attend_one(z, cached[lane], q_t, mixed, rest);
    put_lane(mixed, z.H * z.R, latents, lanes, lane);  // in place of the lane's query
  }
  for (int64_t h = 0; h < z.H; ++h)
    product(z.Dv, z.R, up + (h * (z.Dn + z.Dv) + z.Dn) * z.R, latents + h * z.R * lanes, values + h * z.Dv * lanes,
            lanes);
}

}  // namespace DSFAST_ISA
