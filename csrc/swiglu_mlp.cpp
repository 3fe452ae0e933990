// The gated MLP every token goes through; see dsfast/ops/swiglu_mlp.py.
#include "expert.h"
#include "kernels.h"
#include "pieces.h"

namespace DSFAST_ISA {

void swiglu_rows(const float* x, int64_t x_row, const float* gate_up_t, const float* down_t, float* y, float* gu,
                 int64_t N, int64_t D, int64_t I, bool add) {
  const Expert z = {D, I};
  float* memory = dsfast::scratch(z.forward_memory());
  for (int64_t n = 0; n < N; n += BLOCK)
    expert_forward(z, least(N - n, BLOCK), {x + n * x_row, x_row, 1}, gate_up_t, down_t, gu + n * 2 * I, y + n * D,
                   memory, add);
}

void swiglu_rows_backward(const float* dy, int64_t dy_row, const float* x, int64_t x_row, const float* gate_up,
                          const float* down, const float* gu, float* dx, float* dgate_up, float* ddown, float* memory,
                          int64_t N, int64_t D, int64_t I, bool add) {
  for (int64_t n = 0; n < N; n += BLOCK)
    expert_backward({D, I}, least(N - n, BLOCK), {dy + n * dy_row, dy_row, 1}, {x + n * x_row, x_row, 1}, gate_up, down,
                    gu + n * 2 * I, nullptr, nullptr, dx + n * D, dgate_up, ddown, memory, add);
}

int64_t swiglu_backward_memory(int64_t I) { return Expert{0, I}.backward_memory(); }

void swiglu_mlp_forward(const float* x, int64_t x_row, const float* gate_up_t, const float* down_t, float* y, float* gu,
                        int64_t N, int64_t D, int64_t I, int threads) {
  parallel_ranges(N, threads, [&](int, int64_t n, int64_t end) {
    swiglu_rows(x + n * x_row, x_row, gate_up_t, down_t, y + n * D, gu + n * 2 * I, end - n, D, I, false);
  });
}

void swiglu_mlp_backward(const float* dy, int64_t dy_row, const float* x, int64_t x_row, const float* gate_up,
                         const float* down, const float* gu, float* dx, float* dgate_up, float* ddown, int64_t N,
                         int64_t D, int64_t I, int threads) {
  const int64_t up_size = 2 * I * D, size = Expert{D, I}.gradient_size();
  Partials of_gate_up, of_down;
  parallel_ranges(N, threads, [&](int thread, int64_t n, int64_t end) {
    float* dw = dsfast::scratch(size + swiglu_backward_memory(I));
    clear(dw, size);
    of_gate_up.of[thread] = dw;
    of_down.of[thread] = dw + up_size;
    swiglu_rows_backward(dy + n * dy_row, dy_row, x + n * x_row, x_row, gate_up, down, gu + n * 2 * I, dx + n * D, dw,
                         dw + up_size, dw + size, end - n, D, I, false);
  });
  of_gate_up.add_up(dgate_up, up_size, threads);
  of_down.add_up(ddown, I * D, threads);
}

}  // namespace DSFAST_ISA
