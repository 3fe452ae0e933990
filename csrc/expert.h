// One expert on one block of tokens: (silu(x gate^T) * (x up^T)) down^T and its derivative. Shared by swiglu_mlp (every
// token, one expert) and moe_experts (the tokens of each expert, gathered).
#pragma once
#include "gemm.h"
#include "parallel.h"

namespace DSFAST_ISA {

constexpr int64_t BLOCK = 8 * MR;  // tokens at a time: block, weights and their gradients fit the second-level cache

struct Expert {
  int64_t D, I;
  int64_t up_row, down_row;  // distances between the rows of the weights that a pass reads
  // Floats of working memory for `forward` and `backward`.
  int64_t forward_memory() const { return BLOCK * I; }
  int64_t backward_memory() const { return BLOCK * 4 * I; }
  int64_t gradient_size() const { return 3 * I * D; }
};

// gate_up_t [D, 2I], down_t [I, D]; gu [rows, 2I] keeps what the backward pass needs. y is added to if `add`.
inline void expert_forward(const Expert& z, int64_t rows, Matrix x, const float* gate_up_t, const float* down_t,
                           float* gu, float* y, float* memory, bool add = false) {
  gemm(rows, 2 * z.I, z.D, x, gate_up_t, z.up_row, gu, 2 * z.I);
  for (int64_t n = 0; n < rows; ++n) swiglu(gu + n * 2 * z.I, gu + n * 2 * z.I + z.I, memory + n * z.I, z.I);
  gemm(rows, z.D, z.I, {memory, z.I, 1}, down_t, z.down_row, y, z.D, add);
}

// dx is written, or added to if `add`; dgate_up [2I, D] and ddown [D, I] are added to. The output was scaled by
// weights[n] (null: by 1), whose gradient goes to dweights.
inline void expert_backward(const Expert& z, int64_t rows, Matrix dy, Matrix x, const float* gate_up, const float* down,
                            const float* gu, const float* weights, float* dweights, float* dx, float* dgate_up,
                            float* ddown, float* memory, bool add = false) {
  float *dh = memory, *h = dh + BLOCK * z.I, *dgu = h + BLOCK * z.I;
  gemm(rows, z.I, z.D, dy, down, z.down_row, dh, z.I);
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
  gemm(rows, z.D, 2 * z.I, {dgu, 2 * z.I, 1}, gate_up, z.up_row, dx, z.D, add);
  gemm(2 * z.I, z.D, rows, {dgu, 1, 2 * z.I}, x.data, x.row, dgate_up, z.D, true);
  gemm(z.D, z.I, rows, {dy.data, 1, dy.row}, h, z.I, ddown, z.I, true);
}

}  // namespace DSFAST_ISA
