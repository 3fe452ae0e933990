// What a training step in one call works on: copies of the weights, the memory of a segment of tokens, a clock.
#pragma once
#include <time.h>

#include "linear.h"
#include "model.h"
#include "parallel.h"
#include "pieces.h"

namespace DSFAST_ISA {

using dsfast::Layer;
using dsfast::Model;

// Where the time goes: each call of `charge` counts what has passed since the last one. The order is that of PARTS in
// dsfast/model/native_step.py.
enum Part { EMBEDDING, RMS_NORM, LINEAR, ROPE, ATTENTION, ROUTE, EXPERTS, SWIGLU, HEAD, PARTS };

struct Clock {
  double seconds[2][PARTS] = {};
  double last = now();
  int backward = 0;
  static double now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
  }
  void charge(Part part) {
    const double time = now();
    seconds[backward][part] += time - last;
    last = time;
  }
};

inline int64_t query_width(const Model& m) { return m.query_rank > 0 ? m.query_rank : m.width; }
inline int64_t head_inputs(const Model& m) { return m.heads * m.value; }
inline int64_t queries_width(const Model& m) { return m.heads * (m.nope + m.rope); }
inline int64_t keys_values_width(const Model& m) { return m.heads * (m.nope + m.value); }
inline int64_t latent_width(const Model& m) { return m.latent_rank + m.rope; }

// A layer's weights, packed; those of all experts one after the other. The router's products are always of float32.
struct LayerWeights {
  BuildWeight q_a, q, kv_a, kv_b, o, expert_gate_up, expert_down, gate_up, down;
  Weight<float> router;

  LayerWeights(Carver& c, const Model& m, const Layer& w)
      : q_a(c, w.q_a, 1, m.query_rank, m.width),
        q(c, w.q, 1, queries_width(m), query_width(m)),
        kv_a(c, w.kv_a, 1, latent_width(m), m.width),
        kv_b(c, w.kv_b, 1, keys_values_width(m), m.latent_rank),
        o(c, w.o, 1, m.width, head_inputs(m)),
        expert_gate_up(c, w.experts_gate_up, m.experts, 2 * m.expert_width, m.width),
        expert_down(c, w.experts_down, m.experts, m.width, m.expert_width),
        gate_up(c, w.gate_up, 1, 2 * w.width, m.width),
        down(c, w.down, 1, m.width, w.width),
        router(c, w.router, 1, m.experts, m.width) {}
  void fill() const {
    const BuildWeight* const all[] = {&q_a, &q, &kv_a, &kv_b, &o, &expert_gate_up, &expert_down, &gate_up, &down};
    for (const BuildWeight* w : all) w->fill(1);
    router.fill(1);
  }
};

// All layers' weights, the two projections' and the head's.
struct Weights {
  LayerWeights* layers;
  BuildWeight projection, head_projection;
  HeadWeight head;

  // To be filled.
  Weights(const Model& m, Carver& c)
      : layers(c.of<LayerWeights>(m.layer_count)),
        projection(c, m.projection, 1, m.embedding_rank, m.width),
        head_projection(c, m.head_projection, 1, m.head_width, m.width),
        head(m.head, m.vocabulary, m.head_width, true, c) {
    for (int64_t i = 0; i < m.layer_count; ++i) {
      const LayerWeights layer(c, m, m.layers[i]);
      if (layers != nullptr) layers[i] = layer;
    }
  }
  void fill(const Model& m, int threads) const {
    parallel_tasks(m.layer_count, threads, [&](int64_t layer) { layers[layer].fill(); });
    projection.fill(1);
    head_projection.fill(1);
    head.fill(threads);
  }
};

// In this thread's memory.
inline Weights filled_weights(const Model& m, int threads) {
  const auto weights = carved(dsfast::WEIGHTS, [&](Carver& c) { return Weights(m, c); });
  weights.fill(m, threads);
  return weights;
}

// What a layer keeps of a segment of n tokens for its backward pass. What products read or write down a column has
// padded rows: x, x_mlp, low's normed q_input, latent and o here; in State x and the gradients of what products give
// (dh, dq, dkeys_values, dkv, dlow).
struct LayerState {
  float *h, *rstd, *x;              // the stream [n, D], its norm's scale [n] and result
  float *low, *low_rstd, *q_input;  // only with q_a
  float *q, *kv, *kv_rstd, *latent, *keys_values, *o, *tops;
  float *h_mlp, *mlp_rstd, *x_mlp;
  float *logits, *weights, *expert_gate_up, *gate_up;
  int64_t* chosen;
  int32_t *order, *offsets;
};

// All of a segment's memory.
struct State {
  LayerState* layers;
  float *delta, *h, *rstd, *x, *hidden;                   // after the last layer
  float *dh, *dx, *dq, *dkeys_values, *d_o, *dkv, *dlow;  // gradients of what the names say
  float *dlatent, *dlogits, *dweights, *dhidden, *slots;  // slots [n K, D]: a token's choices
  float* memory;                                          // for one piece at a time
  float* factor;                                          // for the terms of what a linear layer is given
  int64_t* counts;
};

inline LayerState carve_layer(Carver& c, const Model& m, const Layer& w, int64_t n) {
  LayerState s = {};
  s.h = c.floats(n * m.width), s.rstd = c.floats(n), s.x = c.floats(n * padded(m.width));
  s.low = c.floats(n * m.query_rank), s.low_rstd = c.floats(n), s.q_input = c.floats(n * padded(m.query_rank));
  s.q = c.floats(n * queries_width(m));
  s.kv = c.floats(n * latent_width(m)), s.kv_rstd = c.floats(n), s.latent = c.floats(n * padded(m.latent_rank));
  s.keys_values = c.floats(n * keys_values_width(m));
  s.o = c.floats(n * padded(head_inputs(m))), s.tops = c.floats(n * m.heads);
  s.h_mlp = c.floats(n * m.width), s.mlp_rstd = c.floats(n), s.x_mlp = c.floats(n * padded(m.width));
  s.gate_up = c.floats(n * 2 * w.width);
  if (w.router == nullptr) return s;
  const int64_t slots = n * m.chosen;
  s.logits = c.floats(n * m.experts), s.weights = c.floats(slots), s.chosen = c.of<int64_t>(slots);
  s.expert_gate_up = c.floats(slots * 2 * m.expert_width);
  s.order = c.of<int32_t>(slots), s.offsets = c.of<int32_t>(m.experts + 1);
  return s;
}

inline State carve(Carver& c, const Model& m, int64_t n) {
  State s;
  s.layers = c.of<LayerState>(m.layer_count);
  int64_t mlp_width = 0;
  for (int64_t i = 0; i < m.layer_count; ++i) {
    const LayerState layer = carve_layer(c, m, m.layers[i], n);
    if (s.layers != nullptr) s.layers[i] = layer;
    mlp_width = largest(mlp_width, m.layers[i].width);
  }
  const int64_t D = m.width;
  s.delta = c.floats(n * D), s.h = c.floats(n * D), s.rstd = c.floats(n), s.x = c.floats(n * padded(D));
  s.hidden = c.floats(n * m.head_width), s.dhidden = c.floats(n * m.head_width);
  s.dh = c.floats(n * padded(D)), s.dx = c.floats(n * D), s.dq = c.floats(n * padded(queries_width(m)));
  s.dkeys_values = c.floats(n * padded(keys_values_width(m))), s.d_o = c.floats(n * head_inputs(m));
  s.dkv = c.floats(n * padded(latent_width(m))), s.dlow = c.floats(n * padded(largest(m.query_rank, m.embedding_rank)));
  s.dlatent = c.floats(n * m.latent_rank), s.dlogits = c.floats(n * m.experts), s.dweights = c.floats(n * m.chosen);
  s.slots = c.floats(m.chosen > 1 ? n * m.chosen * D : 0);
  const Experts experts = {{D, m.expert_width}, m.chosen, m.experts};
  int64_t memory = largest(experts.forward_memory(), experts.backward_memory());
  memory = largest(memory, Expert{D, mlp_width}.backward_memory());
  memory = largest(memory, largest(embedding_memory(m.embedding_rank), largest(D, m.query_rank)));
  s.memory = c.floats(largest(memory, m.latent_rank));
  const int64_t widest = largest(largest(D, m.query_rank), largest(m.latent_rank, head_inputs(m)));
  s.factor = c.floats(largest(packed_size<float>(widest, n), packed_a_size(n, widest)));
  s.counts = c.of<int64_t>(m.experts);
  return s;
}

}  // namespace DSFAST_ISA
