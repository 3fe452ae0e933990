// The gated MLP every token goes through; see dsfast/ops/swiglu_mlp.py.
#include "kernels.h"
#include "pieces.h"

namespace DSFAST_ISA {

void swiglu_rows(const Expert& z, const float* x, int64_t x_row, const BuildWeight& gate_up, const BuildWeight& down,
                 float* y, float* gu, float* memory, int64_t N, bool add) {
  for (int64_t n = 0; n < N; n += z.block())
    expert_forward(z, least(N - n, z.block()), {x + n * x_row, x_row, 1}, gate_up, down, 0, gu + n * 2 * z.I,
                   y + n * z.D, memory, add);
}

void swiglu_rows_backward(const Expert& z, const float* dy, int64_t dy_row, const float* x, int64_t x_row,
                          const BuildWeight& gate_up, const BuildWeight& down, const float* gu, float* dx,
                          float* dgate_up, float* ddown, float* memory, int64_t N, bool add) {
  for (int64_t n = 0; n < N; n += z.block())
    expert_backward(z, least(N - n, z.block()), {dy + n * dy_row, dy_row, 1}, {x + n * x_row, x_row, 1}, gate_up, down,
                    0, gu + n * 2 * z.I, nullptr, nullptr, dx + n * z.D, dgate_up, ddown, memory, add);
}

void swiglu_mlp_forward(const float* x, int64_t x_row, const float* gate_up, const float* down, float* y, float* gu,
                        int64_t N, int64_t D, int64_t I, int threads) {
  const Expert z = {D, I};
  const MlpWeights w = packed_mlp(z, 1, gate_up, down, false, threads);
  parallel_ranges(N, threads, [&](int, int64_t n, int64_t end) {
    swiglu_rows(z, x + n * x_row, x_row, w.gate_up, w.down, y + n * D, gu + n * 2 * I,
                dsfast::scratch(z.forward_memory()), end - n, false);
  });
}

void swiglu_mlp_backward(const float* dy, int64_t dy_row, const float* x, int64_t x_row, const float* gate_up,
                         const float* down, const float* gu, float* dx, float* dgate_up, float* ddown, int64_t N,
                         int64_t D, int64_t I, int threads) {
  const Expert z = {D, I};
  const MlpWeights w = packed_mlp(z, 1, gate_up, down, true, threads);
  const int64_t up_size = 2 * I * D, size = z.gradient_size();
  Partials of_gate_up, of_down;
  parallel_ranges(N, threads, [&](int thread, int64_t n, int64_t end) {
    float* dw = dsfast::scratch(size + z.backward_memory());
    clear(dw, size);
    of_gate_up.of[thread] = dw;
    of_down.of[thread] = dw + up_size;
    swiglu_rows_backward(z, dy + n * dy_row, dy_row, x + n * x_row, x_row, w.gate_up, w.down, gu + n * 2 * I,
                         dx + n * D, dw, dw + up_size, dw + size, end - n, false);
  });
  of_gate_up.add_up(dgate_up, up_size, threads);
  of_down.add_up(ddown, I * D, threads);
}

}  // namespace DSFAST_ISA
