// Loss and gradients of a whole model in one call; see dsfast/model/native_step.py.
//
// Documents do not meet before the gradients of the weights are added up, so each thread takes a share of them through
// all layers, forward and back, a segment of some documents at a time: what is kept for the backward pass stays in the
// cache, and the threads wait for each other once.
#include "kernels.h"
#include "train_state.h"

namespace DSFAST_ISA {
namespace {

// Tokens of a segment; a longer document is one of its own. All weights and gradients pass the cache once for each, so
// it has a token for so many of them at least, and so many tokens for each expert.
constexpr int64_t SEGMENT = 256, MOST = 4096, WEIGHTS_A_TOKEN = 8192, TOKENS_AN_EXPERT = 32;

// One segment on its way through the model and back.
struct Pass {
  const Model& m;
  const Weights& weights;
  const Model& gradients;  // addresses in `shared`
  const float* shared;
  float* own;  // this thread's gradients, laid out as `shared`
  const State& s;
  Clock& clock;
  int64_t* loads;  // [layers, E]
  // The segment:
  int64_t n;
  const int64_t *ids, *labels, *positions;
  const int32_t* ends;  // documents: cu_seqlens of this segment, counted from `base`
  int64_t documents;
  int32_t base;

  float* gradient(const float* of) const { return own + (of - shared); }
  int64_t row() const { return padded(m.width); }

  template <class F>
  void for_documents(F f) const {
    for (int64_t d = 0; d < documents; ++d)
      if (ends[d + 1] > ends[d]) f(int64_t(ends[d] - base), int64_t(ends[d + 1] - ends[d]));
  }

  AttentionSizes attention_sizes() const { return {m.nope, m.rope, m.value, m.softmax_scale}; }

  // q [n, H, Dn + Dr], keys and values [n, H, Dn + Dv], latent and rope key [n, R + Dr], or their gradients; by rows
  template <class Float>
  AttentionParts<Float> parts(Float* q, int64_t q_row, Float* keys_values, int64_t keys_values_row, Float* kv,
                              int64_t kv_row) const {
    const int64_t q_head = m.nope + m.rope, kv_head = m.nope + m.value;
    return {{q, q_row, q_head},
            {q + m.nope, q_row, q_head},
            {keys_values, keys_values_row, kv_head},
            {kv + m.latent_rank, kv_row, 0},
            {keys_values + m.nope, keys_values_row, kv_head}};
  }
  AttentionParts<const float> parts(const LayerState& l) const {
    return parts<const float>(l.q, queries_width(m), l.keys_values, keys_values_width(m), l.kv, latent_width(m));
  }

  // x [n, width] as the second factor of a weight's gradient; one at a time.
  template <class Term>
  Packed<Term> packed(const float* x, int64_t x_row, int64_t width) const {
    return pack_b(width, n, {x, x_row, 1}, reinterpret_cast<Term*>(s.factor));
  }

  // Turns the rope parts of queries and keys, in place.
  void turn(float* q, int64_t q_row, float* kv, int64_t kv_row, bool inverse) const {
    float *query = q + m.nope, *key = kv + m.latent_rank;
    const int64_t head = m.nope + m.rope;
    rope_rows(query, q_row, head, m.cos, m.sin, positions, query, q_row, head, n, m.heads, m.rope, inverse);
    rope_rows(key, kv_row, 0, m.cos, m.sin, positions, key, kv_row, 0, n, 1, m.rope, inverse);
    clock.charge(ROPE);
  }

  // x -> delta
  void attention(const Layer& layer, const LayerWeights& w, const LayerState& l) const;
  // dh -> dx
  void attention_backward(const Layer& layer, const LayerWeights& w, const Layer& g, const LayerState& l) const;
  // dq -> dlow
  void compressed_queries_backward(const Layer& layer, const LayerWeights& w, const Layer& g,
                                   const LayerState& l) const;
  // logits [n, E], always in float32: near ties decide the choice. A few experts do not fill the lanes, so each score
  // is a sum along the width instead
  void scores(const float* router, const Weight<float>& w, const float* x, float* logits) const;
  // x_mlp -> delta
  void mlp(int64_t number, const LayerWeights& w, const LayerState& l) const;
  // dh -> dx
  void mlp_backward(const Layer& layer, const LayerWeights& w, const Layer& g, const LayerState& l) const;
  // The sum of the segment's losses; the head's gradients are made with it.
  double forward(int64_t ignore_index, float share) const;
  // x -> dx and the loss
  double head(int64_t ignore_index, float share) const;
  // dx -> the gradients of all weights
  void backward() const;
  void embedding_backward() const;
};

void Pass::attention(const Layer& layer, const LayerWeights& w, const LayerState& l) const {
  const Terms<BuildTerm> x = packed_a(n, m.width, {l.x, row(), 1}, reinterpret_cast<BuildTerm*>(s.factor));
  w.kv_a.forward(n, x, l.kv, latent_width(m));
  if (m.query_rank > 0) {
    w.q_a.forward(n, x, l.low, m.query_rank);
    clock.charge(LINEAR);
    rms_norm_rows(l.low, m.query_rank, nullptr, 0, layer.q_a_norm, m.latent_eps, l.q_input, padded(m.query_rank),
                  nullptr, l.low_rstd, n, m.query_rank);
    clock.charge(RMS_NORM);
    w.q.forward(n, Matrix{l.q_input, padded(m.query_rank), 1}, l.q, queries_width(m));
  } else {
    w.q.forward(n, x, l.q, queries_width(m));
  }
  clock.charge(LINEAR);
  const int64_t latent = padded(m.latent_rank), o_row = padded(head_inputs(m));
  rms_norm_rows(l.kv, latent_width(m), nullptr, 0, layer.kv_a_norm, m.latent_eps, l.latent, latent, nullptr, l.kv_rstd,
                n, m.latent_rank);
  clock.charge(RMS_NORM);
  turn(l.q, queries_width(m), l.kv, latent_width(m), false);
  w.kv_b.forward(n, Matrix{l.latent, latent, 1}, l.keys_values, keys_values_width(m));
  clock.charge(LINEAR);
  const auto in = parts(l);
  const Slots o = {l.o, o_row, m.value};
  for_documents([&](int64_t first, int64_t length) {
    for (int64_t head = 0; head < m.heads; ++head)
      attend(in.from(first), length, head, attention_sizes(), o.from(first), l.tops + head * n + first);
  });
  clock.charge(ATTENTION);
  w.o.forward(n, Matrix{l.o, o_row, 1}, s.delta, m.width);
  clock.charge(LINEAR);
}

void Pass::attention_backward(const Layer& layer, const LayerWeights& w, const Layer& g, const LayerState& l) const {
  const int64_t o_row = padded(head_inputs(m)), q_row = padded(queries_width(m)), kv_row = padded(latent_width(m));
  const int64_t keys_values_row = padded(keys_values_width(m)), latent = padded(m.latent_rank);
  linear_backward(n, w.o, {s.dh, row(), 1}, packed<BuildTerm>(l.o, o_row, head_inputs(m)), s.d_o, head_inputs(m),
                  gradient(g.o));
  clock.charge(LINEAR);
  const auto in = parts(l);
  const auto grads = parts<float>(s.dq, q_row, s.dkeys_values, keys_values_row, s.dkv, kv_row);
  const View d_o = {s.d_o, head_inputs(m), m.value};
  for_documents([&](int64_t first, int64_t length) {
    for (int64_t head = 0; head < m.heads; ++head)
      attend_backward(in.from(first), d_o.from(first), l.tops + head * n + first, length, head, attention_sizes(),
                      grads.from(first), head > 0);
  });
  clock.charge(ATTENTION);
  turn(s.dq, q_row, s.dkv, kv_row, true);
  linear_backward(n, w.kv_b, {s.dkeys_values, keys_values_row, 1}, packed<BuildTerm>(l.latent, latent, m.latent_rank),
                  s.dlatent, m.latent_rank, gradient(g.kv_b));
  clock.charge(LINEAR);
  rms_norm_rows_backward(s.dlatent, m.latent_rank, nullptr, 0, l.kv, latent_width(m), layer.kv_a_norm, l.kv_rstd, s.dkv,
                         kv_row, gradient(g.kv_a_norm), s.memory, n, m.latent_rank);
  clock.charge(RMS_NORM);
  if (m.query_rank > 0) compressed_queries_backward(layer, w, g, l);
  const PackedB x = packed<BuildTerm>(l.x, row(), m.width);
  linear_backward(n, w.kv_a, {s.dkv, kv_row, 1}, x, s.dx, m.width, gradient(g.kv_a));
  if (m.query_rank > 0)
    linear_backward(n, w.q_a, {s.dlow, padded(m.query_rank), 1}, x, s.dx, m.width, gradient(g.q_a), true);
  else
    linear_backward(n, w.q, {s.dq, q_row, 1}, x, s.dx, m.width, gradient(g.q), true);
  clock.charge(LINEAR);
}

void Pass::compressed_queries_backward(const Layer& layer, const LayerWeights& w, const Layer& g,
                                       const LayerState& l) const {
  const int64_t low = padded(m.query_rank);
  linear_backward(n, w.q, {s.dq, padded(queries_width(m)), 1}, packed<BuildTerm>(l.q_input, low, m.query_rank), s.dlow,
                  low, gradient(g.q));
  clock.charge(LINEAR);
  rms_norm_rows_backward(s.dlow, low, nullptr, 0, l.low, m.query_rank, layer.q_a_norm, l.low_rstd, s.dlow, low,
                         gradient(g.q_a_norm), s.memory, n, m.query_rank);
  clock.charge(RMS_NORM);
}

void Pass::scores(const float* router, const Weight<float>& w, const float* x, float* logits) const {
  if (m.experts >= W) {
    w.forward(n, Matrix{x, row(), 1}, logits, m.experts);
    return;
  }
  for (int64_t i = 0; i < n * m.experts; ++i) {
    const float *token = x + i / m.experts * row(), *weight = router + i % m.experts * m.width;
    vfloat products = {};
    for_vectors(m.width,
                [&](int64_t d, int64_t count) { products += load_n(token + d, count) * load_n(weight + d, count); });
    logits[i] = sum(products);
  }
}

void Pass::mlp(int64_t number, const LayerWeights& w, const LayerState& l) const {
  const Layer& layer = m.layers[number];
  const bool routed = layer.router != nullptr;
  if (routed) {
    scores(layer.router, w.router, l.x_mlp, l.logits);
    clock.charge(LINEAR);
    moe_route_forward(l.logits, layer.router_bias, l.weights, l.chosen, s.counts, l.order, l.offsets, n, m.experts,
                      m.chosen, m.groups, m.chosen_groups, m.norm_topk_prob, m.softmax_scores, m.routed_scaling, 1);
    for (int64_t e = 0; e < m.experts; ++e) loads[number * m.experts + e] += s.counts[e];
    clock.charge(ROUTE);
    const Experts z = {{m.width, m.expert_width}, m.chosen, m.experts};
    experts_forward(z, l.x_mlp, row(), l.weights, w.expert_gate_up, w.expert_down, l.order, l.offsets,
                    m.chosen > 1 ? s.slots : s.delta, l.expert_gate_up, s.memory, 0, count_blocks(z, l.offsets));
    if (m.chosen > 1) combine_slots(s.slots, s.delta, n, m.chosen, m.width, 1);
    clock.charge(EXPERTS);
  }
  if (layer.width > 0)
    swiglu_rows({m.width, layer.width}, l.x_mlp, row(), w.gate_up, w.down, s.delta, l.gate_up, s.memory, n, routed);
  clock.charge(SWIGLU);
}

void Pass::mlp_backward(const Layer& layer, const LayerWeights& w, const Layer& g, const LayerState& l) const {
  const bool routed = layer.router != nullptr;
  if (routed) {
    const Experts z = {{m.width, m.expert_width}, m.chosen, m.experts};
    experts_backward(z, s.dh, row(), l.x_mlp, row(), l.weights, w.expert_gate_up, w.expert_down, l.expert_gate_up,
                     l.order, l.offsets, m.chosen > 1 ? s.slots : s.dx, s.dweights, gradient(g.experts_gate_up),
                     gradient(g.experts_down), s.memory, 0, count_blocks(z, l.offsets));
    if (m.chosen > 1) combine_slots(s.slots, s.dx, n, m.chosen, m.width, 1);
    clock.charge(EXPERTS);
    moe_route_backward(s.dweights, m.chosen, l.logits, l.chosen, s.dlogits, n, m.experts, m.chosen, m.norm_topk_prob,
                       m.softmax_scores, m.routed_scaling, 1);
    clock.charge(ROUTE);
    linear_backward(n, w.router, {s.dlogits, m.experts, 1}, packed<float>(l.x_mlp, row(), m.width), s.dx, m.width,
                    gradient(g.router), true);
    clock.charge(LINEAR);
  }
  if (layer.width > 0)
    swiglu_rows_backward({m.width, layer.width}, s.dh, row(), l.x_mlp, row(), w.gate_up, w.down, l.gate_up, s.dx,
                         gradient(g.gate_up), gradient(g.down), s.memory, n, routed);
  clock.charge(SWIGLU);
}

double Pass::forward(int64_t ignore_index, float share) const {
  const int64_t D = m.width;
  const float* stream = nullptr;  // what delta is to be added to
  embedding_rows(ids, m.table, m.embedding_rank, weights.projection, s.layers[0].h, s.memory, n, m.embedding_rank, D);
  clock.charge(EMBEDDING);
  for (int64_t i = 0; i < m.layer_count; ++i) {
    const LayerState& l = s.layers[i];
    const Layer& layer = m.layers[i];
    rms_norm_rows(i == 0 ? l.h : s.delta, D, stream, D, layer.input_norm, m.eps, l.x, row(), l.h, l.rstd, n, D);
    clock.charge(RMS_NORM);
    attention(layer, weights.layers[i], l);
    rms_norm_rows(s.delta, D, l.h, D, layer.mlp_norm, m.eps, l.x_mlp, row(), l.h_mlp, l.mlp_rstd, n, D);
    clock.charge(RMS_NORM);
    mlp(i, weights.layers[i], l);
    stream = l.h_mlp;
  }
  rms_norm_rows(s.delta, D, stream, D, m.norm, m.eps, s.x, row(), s.h, s.rstd, n, D);
  clock.charge(RMS_NORM);
  return head(ignore_index, share);
}

double Pass::head(int64_t ignore_index, float share) const {
  const bool projected = m.head_projection != nullptr;
  if (projected) weights.head_projection.forward(n, Matrix{s.x, row(), 1}, s.hidden, m.head_width);
  clock.charge(LINEAR);
  const float* hidden = projected ? s.hidden : s.x;
  const double loss =
      linear_cross_entropy_rows(hidden, projected ? m.head_width : row(), weights.head, labels, ignore_index, share,
                                projected ? s.dhidden : s.dx, gradient(gradients.head), false, n);
  clock.charge(HEAD);
  clock.backward = 1;
  if (projected)
    linear_backward(n, weights.head_projection, {s.dhidden, m.head_width, 1}, packed<BuildTerm>(s.x, row(), m.width),
                    s.dx, m.width, gradient(gradients.head_projection));
  clock.charge(LINEAR);
  return loss;
}

void Pass::backward() const {
  const int64_t D = m.width;
  rms_norm_rows_backward(s.dx, D, nullptr, 0, s.h, D, m.norm, s.rstd, s.dh, row(), gradient(gradients.norm), s.memory,
                         n, D);
  clock.charge(RMS_NORM);
  for (int64_t i = m.layer_count - 1; i >= 0; --i) {
    const LayerState& l = s.layers[i];
    const Layer &layer = m.layers[i], &g = gradients.layers[i];
    mlp_backward(layer, weights.layers[i], g, l);
    rms_norm_rows_backward(s.dx, D, s.dh, row(), l.h_mlp, D, layer.mlp_norm, l.mlp_rstd, s.dh, row(),
                           gradient(g.mlp_norm), s.memory, n, D);
    clock.charge(RMS_NORM);
    attention_backward(layer, weights.layers[i], g, l);
    rms_norm_rows_backward(s.dx, D, s.dh, row(), l.h, D, layer.input_norm, l.rstd, s.dh, row(), gradient(g.input_norm),
                           s.memory, n, D);
    clock.charge(RMS_NORM);
  }
  embedding_backward();
}

void Pass::embedding_backward() const {
  const int64_t R = m.embedding_rank;
  const float* taken = s.dh;
  if (m.projection != nullptr) {
    embedding_rows_backward(s.dh, row(), ids, m.table, R, weights.projection, s.dlow, gradient(gradients.projection),
                            s.memory, n, R, m.width);
    taken = s.dlow;
  }
  const int64_t taken_row = m.projection != nullptr ? R : row();
  float* dtable = gradient(gradients.table);
  for (int64_t i = 0; i < n; ++i) add(taken + i * taken_row, dtable + ids[i] * R, R);
  clock.charge(EMBEDDING);
}

// The first document that begins at or after `token`.
int64_t document_from(const int32_t* cu_seqlens, int64_t S, int64_t token) {
  int64_t d = 0;
  while (d < S && cu_seqlens[d] < token) ++d;
  return d;
}

int64_t segment_tokens(const Model& m, int64_t weights) {
  return largest(SEGMENT, least(MOST, largest(TOKENS_AN_EXPERT * m.experts, weights / WEIGHTS_A_TOKEN)));
}

// f(document, documents) for the segments of the documents begin .. end, of `most` tokens if they can be.
template <class F>
void for_segments(const int32_t* cu_seqlens, int64_t begin, int64_t end, int64_t most, F f) {
  for (int64_t d = begin; d < end;) {
    int64_t next = d + 1;
    while (next < end && cu_seqlens[next + 1] - cu_seqlens[d] <= most) ++next;
    f(d, next - d);
    d = next;
  }
}

}  // namespace

float train_step(const Model* model, const Model* gradients, float* shared, int64_t size, const int64_t* ids,
                 const int64_t* labels, const int64_t* positions, const int32_t* cu_seqlens, int64_t N, int64_t S,
                 int64_t ignore_index, int64_t* loads, double* seconds, int threads) {
  const Model& m = *model;
  int64_t counted = 0;
  for (int64_t n = 0; n < N; ++n) counted += labels[n] != ignore_index;
  const float share = counted > 0 ? 1.0f / float(counted) : 0.0f;
  const Weights weights = filled_weights(m, threads);
  const int64_t load_size = m.layer_count * m.experts, tokens = segment_tokens(m, size);
  double losses[MAX_THREADS] = {};
  Clock clocks[MAX_THREADS];
  Partials partials;
  int64_t* of_thread[MAX_THREADS] = {};
  parallel_ranges(N, threads, [&](int thread, int64_t first_token, int64_t last_token) {
    Clock& clock = clocks[thread] = Clock{};
    const int64_t begin = document_from(cu_seqlens, S, first_token), end = document_from(cu_seqlens, S, last_token);
    int64_t most = 0;
    for_segments(cu_seqlens, begin, end, tokens, [&](int64_t d, int64_t documents) {
      const int64_t n = cu_seqlens[d + documents] - cu_seqlens[d];
      most = largest(most, n);
    });
    struct Memory {
      State state;
      int64_t* loads;
    };
    const auto memory =
        carved(dsfast::ACTIVATIONS, [&](Carver& c) { return Memory{carve(c, m, most), c.of<int64_t>(load_size)}; });
    of_thread[thread] = memory.loads;
    for (int64_t i = 0; i < load_size; ++i) memory.loads[i] = 0;
    float* own = partials.of[thread] = dsfast::scratch(size, dsfast::GRADIENTS);
    clear(own, size);
    for_segments(cu_seqlens, begin, end, tokens, [&](int64_t d, int64_t documents) {
      const int32_t base = cu_seqlens[d];
      const int64_t n = cu_seqlens[d + documents] - base;
      if (n == 0) return;
      const Pass pass = {
          m,          weights,       *gradients,       shared,         own,       memory.state, clock, memory.loads, n,
          ids + base, labels + base, positions + base, cu_seqlens + d, documents, base};
      clock.backward = 0;
      losses[thread] += pass.forward(ignore_index, share);
      pass.backward();
    });
  });
  partials.add_up(shared, size, threads);
  double total = 0;
  for (double part : losses) total += part;
  for (int64_t i = 0; i < load_size; ++i) {
    loads[i] = 0;
    for (int t = 0; t < MAX_THREADS; ++t)
      if (of_thread[t] != nullptr) loads[i] += of_thread[t][i];
  }
  for (int i = 0; i < 2 * PARTS; ++i) {
    seconds[i] = 0;
    for (const Clock& clock : clocks) seconds[i] += clock.seconds[i / PARTS][i % PARTS];
  }
  return counted > 0 ? float(total / double(counted)) : 0.0f;
}

}  // namespace DSFAST_ISA
