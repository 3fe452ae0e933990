// The gated MLP every token goes through; see dsfast/ops/swiglu_mlp.py.
#include "expert.h"
#include "kernels.h"

namespace DSFAST_ISA {

void swiglu_mlp_forward(const float* x, int64_t x_row, const float* gate_up_t, const float* down_t, float* y, float* gu,
                        int64_t N, int64_t D, int64_t I, int threads) {
  const Expert z = {D, I};
  parallel_ranges(N, threads, [&](int, int64_t begin, int64_t end) {
    float* memory = dsfast::scratch(z.forward_memory());
    for (int64_t n = begin; n < end; n += BLOCK) {
      const int64_t rows = least(end - n, BLOCK);
      expert_forward(z, rows, {x + n * x_row, x_row, 1}, gate_up_t, down_t, gu + n * 2 * I, y + n * D, memory);
    }
  });
}

void swiglu_mlp_backward(const float* dy, int64_t dy_row, const float* x, int64_t x_row, const float* gate_up,
                         const float* down, const float* gu, float* dx, float* dgate_up, float* ddown, int64_t N,
                         int64_t D, int64_t I, int threads) {
  const Expert z = {D, I};
  Partials of_gate_up, of_down;
  parallel_ranges(N, threads, [&](int thread, int64_t begin, int64_t end) {
    float* memory = dsfast::scratch(z.gradient_size() + z.backward_memory());
    float* dw = memory + z.backward_memory();
    clear(dw, z.gradient_size());
    of_gate_up.of[thread] = dw;
    of_down.of[thread] = dw + 2 * I * D;
    for (int64_t n = begin; n < end; n += BLOCK) {
      const int64_t rows = least(end - n, BLOCK);
      expert_backward(z, rows, {dy + n * dy_row, dy_row, 1}, {x + n * x_row, x_row, 1}, gate_up, down, gu + n * 2 * I,
                      nullptr, nullptr, dx + n * D, dw, dw + 2 * I * D, memory);
    }
  });
  of_gate_up.add_up(dgate_up, 2 * I * D, threads);
  of_down.add_up(ddown, I * D, threads);
}

}  // namespace DSFAST_ISA
