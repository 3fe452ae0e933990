// One query per sequence against its cached latents; see dsfast/ops/mla_decode.py.
#include "kernels.h"
#include "latent_attention.h"
#include "parallel.h"

namespace DSFAST_ISA {

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
  const LatentAttention z = {H, R, Dn, Dr, Dv, latent_token, rope_token, scale};
  const int64_t q_width = H * (Dn + Dr);
  parallel_ranges(B, threads, [&](int, int64_t begin, int64_t end) {
    float* q = dsfast::scratch((q_width + H * Dv) * NR + z.memory(longest));
    float *values = q + q_width * NR, *memory = values + H * Dv * NR;
    for (int64_t first = begin; first < end; first += NR) {
      const int64_t rows = least(end - first, NR), lanes = lanes_for(rows);
      if (rows < lanes) clear(q, q_width * lanes);
      Cached cached[NR];
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t b = first + i;
        cached[i] = {latent + b * latent_row, k_rope + b * rope_row, lengths[b]};
        for (int64_t h = 0; h < H; ++h) {
          float* head = q + h * (Dn + Dr) * lanes;
          put_lane(q_nope + b * qn_row + h * qn_head, Dn, head, lanes, i);
          put_lane(q_rope + b * qr_row + h * qr_head, Dr, head + Dn * lanes, lanes, i);
        }
      }
      attend_block(z, q, up, cached, rows, lanes, values, memory);
      for (int64_t i = 0; i < rows; ++i) take_lane(values, lanes, i, H * Dv, o + (first + i) * H * Dv);
    }
  });
  return 0;
}

}  // namespace DSFAST_ISA
