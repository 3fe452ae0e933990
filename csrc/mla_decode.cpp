// One query per sequence against its cached latents; see dsfast/ops/mla_decode.py.
#include "kernels.h"
#include "latent_attention.h"
#include "parallel.h"

namespace DSFAST_ISA {
namespace {

constexpr int64_t SEQUENCES = 32;  // whose queries meet a head's weights at a time

}  // namespace

int64_t mla_decode(const float* q_nope, int64_t qn_row, int64_t qn_head, const float* q_rope, int64_t qr_row,
                   int64_t qr_head, const float* latent, int64_t latent_row, int64_t latent_token, const float* k_rope,
                   int64_t rope_row, int64_t rope_token, const int64_t* lengths, const float* up, float scale, float* o,
                   int64_t B, int64_t C, int64_t H, int64_t R, int64_t Dn, int64_t Dr, int64_t Dv, int threads) {
  int64_t bad = 0, longest = 0;
  for (int64_t b = 0; b < B; ++b) {
    bad += lengths[b] < 0 || lengths[b] > C;
    longest = lengths[b] > longest ? lengths[b] : longest;
  }
  if (bad != 0) return bad;
  const auto some = [&](int64_t first, int64_t rows, int64_t head, int64_t heads) {
    const LatentAttention z = {heads, R, Dr, latent_token, rope_token, scale};
    float* mixed = dsfast::scratch(rows * heads * R + z.memory(longest));  // first the queries
    for (int64_t h = 0; h < heads; ++h)
      gemm(rows, R, Dn, {q_nope + first * qn_row + (head + h) * qn_head, qn_row, 1},
           {up + (head + h) * (Dn + Dv) * R, R, 1}, mixed + h * R, heads * R);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t b = first + i;
      float* here = mixed + i * heads * R;
      attend_one(z, {latent + b * latent_row, k_rope + b * rope_row, lengths[b]},
                 {here, R, q_rope + b * qr_row + head * qr_head, qr_head}, here, mixed + rows * heads * R);
    }
    for (int64_t h = 0; h < heads; ++h)
      gemm(rows, Dv, R, {mixed + h * R, heads * R, 1}, {up + ((head + h) * (Dn + Dv) + Dn) * R, 1, R},
           o + (first * H + head + h) * Dv, H * Dv);
  };
  // What is larger, cache or weights, is read by one thread alone.
  if (H * (Dn + Dv) > B * C)
    parallel_ranges(H, threads, [&](int, int64_t begin, int64_t end) {
      for (int64_t first = 0; first < B; first += SEQUENCES)
        some(first, least(B - first, SEQUENCES), begin, end - begin);
    });
  else
    parallel_ranges(B, threads, [&](int, int64_t begin, int64_t end) {
      for (int64_t first = begin; first < end; first += SEQUENCES) some(first, least(end - first, SEQUENCES), 0, H);
    });
  return 0;
}

}  // namespace DSFAST_ISA
