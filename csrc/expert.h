// One expert on one block of tokens: (silu(x gate^T) * (x up^T)) down^T and its derivative. Shared by swiglu_mlp (every
// token, one expert) and moe_experts (the tokens of each expert, gathered).
#pragma once
#include "linear.h"
#include "parallel.h"

namespace DSFAST_ISA {

struct Expert {
  int64_t D, I;
  // Tokens at a time: few where they, the weights and their gradients fit the second-level cache; else so many that
  // reading the weights costs little beside the products.
  int64_t block() const { return (gradient_size() <= 65536 ? 8 : 64) * MR; }
  // Floats of working memory for `forward` and `backward`.
  int64_t forward_memory() const { return block() * I; }
  int64_t backward_memory() const { return block() * 4 * I; }
  int64_t gradient_size() const { return 3 * I * D; }
};

// The weights [E, 2I, D] and [E, D, I] of E experts, for one pass.
struct MlpWeights {
  BuildWeight gate_up, down;
  MlpWeights(Carver& c, const Expert& z, int64_t E, const float* gate_up, const float* down, bool backward)
      : gate_up(c, gate_up, E, 2 * z.I, z.D, !backward, backward), down(c, down, E, z.D, z.I, !backward, backward) {}
};

// In this thread's memory.
inline MlpWeights packed_mlp(const Expert& z, int64_t E, const float* gate_up, const float* down, bool backward,
                             int threads) {
  const auto w = carved(dsfast::WEIGHTS, [&](Carver& c) { return MlpWeights(c, z, E, gate_up, down, backward); });
  w.gate_up.fill(threads);
  w.down.fill(threads);
  return w;
}

// Expert e. gu [rows, 2I] keeps what the backward pass needs. y is added to if `add`.
inline void expert_forward(const Expert& z, int64_t rows, Matrix x, const BuildWeight& gate_up, const BuildWeight& down,
                           int64_t e, float* gu, float* y, float* memory, bool add = false) {
  gate_up.forward(rows, x, gu, 2 * z.I, false, e);
  for (int64_t n = 0; n < rows; ++n) swiglu(gu + n * 2 * z.I, gu + n * 2 * z.I + z.I, memory + n * z.I, z.I);
  down.forward(rows, Matrix{memory, z.I, 1}, y, z.D, add, e);
}

// Expert e. dx is written, or added to if `add`; dgate_up [2I, D] and ddown [D, I] are added to. The output was scaled
// by weights[n] (null: by 1), whose gradient goes to dweights.
inline void expert_backward(const Expert& z, int64_t rows, Matrix dy, Matrix x, const BuildWeight& gate_up,
                            const BuildWeight& down, int64_t e, const float* gu, const float* weights, float* dweights,
                            float* dx, float* dgate_up, float* ddown, float* memory, bool add = false) {
  float *dh = memory, *h = dh + z.block() * z.I, *dgu = h + z.block() * z.I;
  down.backward(rows, dy, dh, z.I, false, e);
  for (int64_t n = 0; n < rows; ++n) {
    const float weight = weights == nullptr ? 1.0f : weights[n];
    vfloat dweight = {};
    for_vectors(z.I, [&](int64_t i, int64_t count) {
      const vfloat gate = load_n(gu + n * 2 * z.I + i, count), up = load_n(gu + n * 2 * z.I + z.I + i, count);
      const vfloat s = sigmoid(gate), silu = gate * s, grad = load_n(dh + n * z.I + i, count);
      dweight += grad * silu * up;
      store_n(h + n * z.I + i, silu * up * weight, count);
      store_n(dgu + n * 2 * z.I + i, grad * weight * up * s * (1.0f + gate * (1.0f - s)), count);
      store_n(dgu + n * 2 * z.I + z.I + i, grad * weight * silu, count);
    });
    if (dweights != nullptr) dweights[n] = sum(dweight);
  }
  gate_up.backward(rows, {dgu, 2 * z.I, 1}, dx, z.D, add, e);
  gemm(2 * z.I, z.D, rows, {dgu, 1, 2 * z.I}, x, dgate_up, z.D, true);
  gemm(z.D, z.I, rows, {dy.data, 1, dy.row}, {h, z.I, 1}, ddown, z.I, true);
}

}  // namespace DSFAST_ISA
