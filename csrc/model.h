// What a whole-model call (decode_step, train_step) needs to know of a model: sizes and the addresses of its weights,
// or of their gradients, float32 and row-major as PyTorch keeps them. Filled in from Python
// (dsfast/model/native_model.py), which also keeps them alive.
#pragma once
#include <cstdint>

namespace dsfast {

// Shape letters as in dsfast/model/: D model width, H heads, Q rank of the queries (query_rank), R that of the latent,
// Dn / Dr / Dv widths of plain key, rotary key and value, E experts, I their width (expert_width), V vocabulary.
struct Layer {
  const float *input_norm, *mlp_norm;           // [D]
  const float *q_a, *q_a_norm;                  // [Q, D], [Q]; unused where query_rank is 0
  const float* q;                               // [H (Dn + Dr), Q or D]
  const float *kv_a, *kv_a_norm;                // [R + Dr, D], [R]
  const float *kv_b, *o;                        // [H (Dn + Dv), R], [D, H Dv]
  const float *router, *router_bias;            // [E, D], [E]; null in a dense layer
  const float *experts_gate_up, *experts_down;  // [E, 2 I, D], [E, D, I]
  const float *gate_up, *down;                  // [2 width, D], [D, width]: the dense MLP or shared experts
  int64_t width;                                // 0: no shared experts
};

struct Model {
  int64_t vocabulary, width, heads, latent_rank, query_rank, nope, rope, value;
  int64_t experts, chosen, groups, chosen_groups, expert_width;
  bool norm_topk_prob, softmax_scores;
  float routed_scaling, softmax_scale, eps, latent_eps;
  const float *cos, *sin;           // [positions, Dr / 2]
  const float *table, *projection;  // [V, rank], [rank, D]; without a projection (null) rank is D
  int64_t embedding_rank;
  const float* norm;                    // [D]
  const float *head_projection, *head;  // null or [head_width, D], then [V, head_width]
  int64_t head_width;
  const Layer* layers;
  int64_t layer_count;
};

}  // namespace dsfast
