// One expert on one block of tokens: (silu(x gate^T) * (x up^T)) down^T and its derivative. Shared by swiglu_mlp (every
// token, one expert) and moe_experts (the tokens of each expert, gathered).
#pragma once
#include "gemm.h"
#include "parallel.h"

namespace DSFAST_ISA {

struct Expert {
  int64_t D, I;
  int64_t up_row, down_row;  // strides of the weights that a pass reads
  int64_t up_column = 1, down_column = 1;
  // Tokens at a time: few where they, the weights and their gradients fit the second-level cache; else so many that
  // reading the weights costs little beside the products.
  int64_t block() const { return (gradient_size() <= 65536 ? 8 : 64) * MR; }
  // Floats of working memory for `forward` and `backward`.
  int64_t forward_memory() const { return block() * I; }
  int64_t backward_memory() const { return block() * 4 * I; }
  // Floats from one expert's weights to the next one's, in a forward pass.
  int64_t up_size() const { return up_column == 1 ? D * up_row : 2 * I * up_column; }
  int64_t down_size() const { return down_column == 1 ? I * down_row : D * down_column; }
  Matrix up(const float* w) const { return {w, up_row, up_column}; }
  Matrix down(const float* w) const { return {w, down_row, down_column}; }
  int64_t gradient_size() const { return 3 * I * D; }
};

// How a forward pass reads the weights transposed: from copies made so, or as they lie.
inline Expert transposed_expert(int64_t D, int64_t I, bool copied) {
  return copied ? Expert{D, I, 2 * I, D} : Expert{D, I, 1, 1, D, I};
}

// gate_up_t [D, 2I], down_t [I, D], by their strides; gu [rows, 2I] keeps what the backward pass needs. y is added to
// if `add`.
inline void expert_forward(const Expert& z, int64_t rows, Matrix x, const float* gate_up_t, const float* down_t,
                           float* gu, float* y, float* memory, bool add = false) {
  gemm(rows, 2 * z.I, z.D, x, z.up(gate_up_t), gu, 2 * z.I);
  for (int64_t n = 0; n < rows; ++n) swiglu(gu + n * 2 * z.I, gu + n * 2 * z.I + z.I, memory + n * z.I, z.I);
  gemm(rows, z.D, z.I, {memory, z.I, 1}, z.down(down_t), y, z.D, add);
}

// dx is written, or added to if `add`; dgate_up [2I, D] and ddown [D, I] are added to. The output was scaled by
// weights[n] (null: by 1), whose gradient goes to dweights.
inline void expert_backward(const Expert& z, int64_t rows, Matrix dy, Matrix x, const float* gate_up, const float* down,
                            const float* gu, const float* weights, float* dweights, float* dx, float* dgate_up,
                            float* ddown, float* memory, bool add = false) {
  float *dh = memory, *h = dh + z.block() * z.I, *dgu = h + z.block() * z.I;
  gemm(rows, z.I, z.D, dy, z.down(down), dh, z.I);
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
  gemm(rows, z.D, 2 * z.I, {dgu, 2 * z.I, 1}, z.up(gate_up), dx, z.D, add);
  gemm(2 * z.I, z.D, rows, {dgu, 1, 2 * z.I}, x, dgate_up, z.D, true);
  gemm(z.D, z.I, rows, {dy.data, 1, dy.row}, {h, z.I, 1}, ddown, z.I, true);
}

}  // namespace DSFAST_ISA
