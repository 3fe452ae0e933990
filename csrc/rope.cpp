// Rotation of interleaved pairs by the token's position; see dsfast/ops/rope.py.
#include "kernels.h"
#include "parallel.h"

namespace DSFAST_ISA {

int64_t rope(const float* x, int64_t x_token, int64_t x_head, const float* cos, const float* sin,
             const int64_t* positions, float* y, int64_t N, int64_t H, int64_t Dr, int64_t P, bool inverse,
             int threads) {
  int64_t bad = 0;
  for (int64_t n = 0; n < N; ++n) bad += positions[n] < 0 || positions[n] >= P;
  if (bad != 0) return bad;
  const int64_t pairs = Dr / 2;
  const float sign = inverse ? -1.0f : 1.0f;
  parallel_ranges(N, threads, [&](int, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const float *c = cos + positions[n] * pairs, *s = sin + positions[n] * pairs;
      for (int64_t head = 0; head < H; ++head) {
        const float* in = x + n * x_token + head * x_head;
        float* out = y + (n * H + head) * Dr;
        for (int64_t i = 0; i < pairs; ++i) {
          const float even = in[2 * i], odd = in[2 * i + 1], turn = sign * s[i];
          out[2 * i] = even * c[i] - odd * turn;
          out[2 * i + 1] = even * turn + odd * c[i];
        }
      }
    }
  });
  return 0;
}

}  // namespace DSFAST_ISA
