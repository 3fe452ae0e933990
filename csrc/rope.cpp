// Rotation of interleaved pairs by the token's position; see dsfast/ops/rope.py.
#include "kernels.h"
#include "parallel.h"
#include "pieces.h"

namespace DSFAST_ISA {

void rope_rows(const float* x, int64_t x_token, int64_t x_head, const float* cos, const float* sin,
               const int64_t* positions, float* y, int64_t y_token, int64_t y_head, int64_t N, int64_t H, int64_t Dr,
               bool inverse) {
  const int64_t pairs = Dr / 2;
  const float sign = inverse ? -1.0f : 1.0f;
  for (int64_t n = 0; n < N; ++n) {
    const float *c = cos + positions[n] * pairs, *s = sin + positions[n] * pairs;
    for (int64_t head = 0; head < H; ++head) {
      const float* in = x + n * x_token + head * x_head;
      float* out = y + n * y_token + head * y_head;
      for (int64_t i = 0; i < pairs; ++i) {
        const float even = in[2 * i], odd = in[2 * i + 1], turn = sign * s[i];
        out[2 * i] = even * c[i] - odd * turn;
        out[2 * i + 1] = even * turn + odd * c[i];
      }
    }
  }
}

int64_t rope(const float* x, int64_t x_token, int64_t x_head, const float* cos, const float* sin,
             const int64_t* positions, float* y, int64_t y_token, int64_t y_head, int64_t N, int64_t H, int64_t Dr,
             int64_t P, bool inverse, int threads) {
  int64_t bad = 0;
  for (int64_t n = 0; n < N; ++n) bad += positions[n] < 0 || positions[n] >= P;
  if (bad != 0) return bad;
  parallel_ranges(N, threads, [&](int, int64_t n, int64_t end) {
    rope_rows(x + n * x_token, x_token, x_head, cos, sin, positions + n, y + n * y_token, y_token, y_head, end - n, H,
              Dr, inverse);
  });
  return 0;
}

}  // namespace DSFAST_ISA
