// The routed experts over their tokens, sorted by expert; see dsfast/ops/moe_experts.py.
#include "expert.h"
#include "kernels.h"
#include "pieces.h"

namespace DSFAST_ISA {
namespace {

// f(expert, first, rows) for the blocks begin .. end of all experts' sorted slots.
template <class F>
void for_blocks(const Experts& z, const int32_t* offsets, int64_t begin, int64_t end, F f) {
  int64_t block = 0;
  const int64_t rows = z.each.block();
  for (int64_t e = 0; e < z.E; ++e)
    for (int64_t first = offsets[e]; first < offsets[e + 1]; first += rows, ++block)
      if (block >= begin && block < end) f(e, first, least(offsets[e + 1] - first, rows));
}

void gather(const float* x, int64_t x_row, const int32_t* order, int64_t rows, int64_t K, int64_t D, float* out) {
  for (int64_t i = 0; i < rows; ++i) copy(x + order[i] / K * x_row, out + i * D, D);
}

bool of_slots(const int32_t* order, const int32_t* offsets, int64_t slots, int64_t E) {
  bool good = offsets[0] == 0 && offsets[E] == slots;
  for (int64_t e = 0; e < E; ++e) good &= offsets[e] <= offsets[e + 1];
  for (int64_t i = 0; i < slots; ++i) good &= uint32_t(order[i]) < uint64_t(slots);
  return good;
}

// to[slot] = scale[slot] * rows (scale null: 1)
void scatter(const float* block, const int32_t* order, int64_t rows, int64_t D, const float* scale, float* to) {
  for (int64_t i = 0; i < rows; ++i) {
    const float factor = scale == nullptr ? 1.0f : scale[order[i]];
    for_vectors(
        D, [&](int64_t d, int64_t n) { store_n(to + order[i] * D + d, load_n(block + i * D + d, n) * factor, n); });
  }
}

}  // namespace

int64_t count_blocks(const Experts& z, const int32_t* offsets) {
  int64_t blocks = 0;
  const int64_t rows = z.each.block();
  for (int64_t e = 0; e < z.E; ++e) blocks += (offsets[e + 1] - offsets[e] + rows - 1) / rows;
  return blocks;
}

void combine_slots(const float* slots, float* out, int64_t N, int64_t K, int64_t D, int threads) {
  parallel_ranges(N, threads, [&](int, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n)
      for_vectors(D, [&](int64_t d, int64_t count) {
        vfloat total = load_n(slots + n * K * D + d, count);
        for (int64_t k = 1; k < K; ++k) total += load_n(slots + (n * K + k) * D + d, count);
        store_n(out + n * D + d, total, count);
      });
  });
}

void experts_forward(const Experts& z, const float* x, int64_t x_row, const float* weights, const BuildWeight& gate_up,
                     const BuildWeight& down, const int32_t* order, const int32_t* offsets, float* slots, float* gu,
                     float* memory, int64_t begin, int64_t end) {
  const int64_t D = z.each.D, I = z.each.I;
  float *in = memory + z.each.forward_memory(), *out = in + z.each.block() * D;
  for_blocks(z, offsets, begin, end, [&](int64_t e, int64_t first, int64_t rows) {
    gather(x, x_row, order + first, rows, z.K, D, in);
    expert_forward(z.each, rows, {in, D, 1}, gate_up, down, e, gu + first * 2 * I, out, memory);
    scatter(out, order + first, rows, D, weights, slots);
  });
}

void experts_backward(const Experts& z, const float* dy, int64_t dy_row, const float* x, int64_t x_row,
                      const float* weights, const BuildWeight& gate_up, const BuildWeight& down, const float* gu,
                      const int32_t* order, const int32_t* offsets, float* slots, float* dweights, float* dgate_up,
                      float* ddown, float* memory, int64_t begin, int64_t end) {
  const int64_t D = z.each.D, I = z.each.I;
  float *grad_in = memory + z.each.backward_memory(), *in = grad_in + z.each.block() * D,
        *out = in + z.each.block() * D;
  float *w = out + z.each.block() * D, *dw = w + z.each.block();
  for_blocks(z, offsets, begin, end, [&](int64_t e, int64_t first, int64_t rows) {
    gather(dy, dy_row, order + first, rows, z.K, D, grad_in);
    gather(x, x_row, order + first, rows, z.K, D, in);
    for (int64_t i = 0; i < rows; ++i) w[i] = weights[order[first + i]];
    expert_backward(z.each, rows, {grad_in, D, 1}, {in, D, 1}, gate_up, down, e, gu + first * 2 * I, w, dw, out,
                    dgate_up + e * 2 * I * D, ddown + e * D * I, memory);
    for (int64_t i = 0; i < rows; ++i) dweights[order[first + i]] = dw[i];
    scatter(out, order + first, rows, D, nullptr, slots);
  });
}

bool moe_experts_forward(const float* x, int64_t x_row, const float* weights, const int32_t* order,
                         const int32_t* offsets, const float* gate_up, const float* down, float* y, float* gu,
                         float* slots, int64_t N, int64_t D, int64_t K, int64_t E, int64_t I, int threads) {
  if (!of_slots(order, offsets, N * K, E)) return false;
  const Experts z = {{D, I}, K, E};
  const MlpWeights w = packed_mlp(z.each, E, gate_up, down, false, threads);
  parallel_ranges(count_blocks(z, offsets), threads, [&](int, int64_t begin, int64_t end) {
    experts_forward(z, x, x_row, weights, w.gate_up, w.down, order, offsets, K > 1 ? slots : y, gu,
                    dsfast::scratch(z.forward_memory()), begin, end);
  });
  if (K > 1) combine_slots(slots, y, N, K, D, threads);
  return true;
}

void moe_experts_backward(const float* dy, int64_t dy_row, const float* x, int64_t x_row, const float* weights,
                          const float* gate_up, const float* down, const float* gu, const int32_t* order,
                          const int32_t* offsets, float* dx, float* dweights, float* dgate_up, float* ddown,
                          float* slots, int64_t N, int64_t D, int64_t K, int64_t E, int64_t I, int threads) {
  const Experts z = {{D, I}, K, E};
  const MlpWeights w = packed_mlp(z.each, E, gate_up, down, true, threads);
  const int64_t up_size = E * 2 * I * D, size = E * z.each.gradient_size();
  Partials of_gate_up, of_down;
  parallel_ranges(count_blocks(z, offsets), threads, [&](int thread, int64_t begin, int64_t end) {
    float* dw = dsfast::scratch(size + z.backward_memory());
    clear(dw, size);
    of_gate_up.of[thread] = dw;
    of_down.of[thread] = dw + up_size;
    experts_backward(z, dy, dy_row, x, x_row, weights, w.gate_up, w.down, gu, order, offsets, K > 1 ? slots : dx,
                     dweights, dw, dw + up_size, dw + size, begin, end);
  });
  of_gate_up.add_up(dgate_up, up_size, threads);
  of_down.add_up(ddown, E * I * D, threads);
  if (K > 1) combine_slots(slots, dx, N, K, D, threads);
}

}  // namespace DSFAST_ISA
