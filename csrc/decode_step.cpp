// A whole model's step for N tokens in one call: each writes its latent to the cache, attends to what its sequence
// holds up to itself, and the state after the last token of each sequence chooses the next. See
// dsfast/model/native_decode.py.
#include "carver.h"
#include "kernels.h"
#include "latent_attention.h"
#include "model.h"
#include "parallel.h"
#include "pieces.h"
#include "route.h"

namespace DSFAST_ISA {
namespace {

using dsfast::Layer;
using dsfast::Model;

constexpr int64_t TOKENS = 48;  // that go through the layers together: what is kept of them stays in the cache
constexpr int64_t WORDS = 128;  // of the vocabulary whose logits are made at a time: they stay in the first-level cache

// Weights [N, K] of the same size, one behind the other, as `product` reads them.
struct Weights {
  const float* panels;
  int64_t N, K;
  Packed<float> at(int64_t i = 0) const { return packed_at(panels, N, K, i); }
};

// Goes through the weights of a model, which lie packed in one block of memory; with `threads` it packs a thread's
// share of each.
struct Packing {
  Carver memory;
  int64_t thread = 0, threads = 0;

  // `count` weights [N, K] where `from` is and then each `distance` floats on, or with `turned` [K, N]; none if null.
  Weights next(const float* from, int64_t N, int64_t K, int64_t count = 1, int64_t distance = 0, bool turned = false) {
    if (from == nullptr) return {};
    const int64_t size = packed_size<float>(N, K), panel = panel_size<float>(K), panels = (N + NR - 1) / NR;
    float* packed = memory.floats(count * size);
    const int64_t begin = threads == 0 ? 0 : panels * thread / threads * NR;
    const int64_t end = threads == 0 ? 0 : least(N, panels * (thread + 1) / threads * NR);
    for (int64_t i = 0; i < count && begin < end; ++i) {
      const Matrix w = {from + i * distance, turned ? N : 1, turned ? 1 : K};
      pack_b(end - begin, K, w.columns_from(begin), packed + i * size + begin / NR * panel);
    }
    return {packed, N, K};
  }
};

struct ModelWeights {
  Weights projection, head_projection, head;
  ModelWeights(const Model& m, Packing& packing) {
    projection = packing.next(m.projection, m.width, m.embedding_rank, 1, 0, true);
    head_projection = packing.next(m.head_projection, m.head_width, m.width);
    head = packing.next(m.head, m.vocabulary, m.head_width);
  }
};

struct LayerWeights {
  Weights q_a, q, kv_a, up_key, up_value, o, router, gate_up, down, experts_gate_up, experts_down;
  LayerWeights(const Model& m, const Layer& layer, Packing& packing) {
    const int64_t D = m.width, R = m.latent_rank, up = (m.nope + m.value) * R, I = m.expert_width;
    q_a = packing.next(layer.q_a, m.query_rank, D);
    q = packing.next(layer.q, m.heads * (m.nope + m.rope), m.query_rank > 0 ? m.query_rank : D);
    kv_a = packing.next(layer.kv_a, R + m.rope, D);
    up_key = packing.next(layer.kv_b, R, m.nope, m.heads, up, true);
    up_value = packing.next(layer.kv_b + m.nope * R, m.value, R, m.heads, up);
    o = packing.next(layer.o, D, m.heads * m.value);
    router = packing.next(layer.router, m.experts, D);
    gate_up = packing.next(layer.gate_up, 2 * layer.width, D);
    down = packing.next(layer.down, D, layer.width);
    experts_gate_up = packing.next(layer.experts_gate_up, 2 * I, D, m.experts, 2 * I * D);
    experts_down = packing.next(layer.experts_down, D, I, m.experts, D * I);
  }
};

// The cache [layers][rows][capacity][R or Dr].
struct Cache {
  float *latent, *k_rope;
  int64_t rows, capacity;
  int64_t place(int64_t layer, int64_t row, int64_t position) const {
    return (layer * rows + row) * capacity + position;
  }
};

struct Tokens {
  const int64_t *ids, *rows, *positions;
  int64_t count;
  DSFAST_INLINE bool ends_row(int64_t n) const { return n + 1 == count || rows[n + 1] != rows[n]; }
};

LatentAttention attention_of(const Model& m) {
  return {m.heads, m.latent_rank, m.rope, m.latent_rank, m.rope, m.softmax_scale};
}

Choice choice_of(const Model& m) {
  return {m.experts, m.chosen, m.groups, m.chosen_groups, m.norm_topk_prob, m.softmax_scores, m.routed_scaling};
}

int64_t widest_mlp(const Model& m) {
  int64_t width = m.expert_width;
  for (int64_t i = 0; i < m.layer_count; ++i) width = largest(width, m.layers[i].width);
  return width;
}

// A thread's working memory; all but the last two are [TOKENS][width].
struct Work {
  float *stream, *x, *delta, *low;      // delta: what is added to the stream; low: what is projected up or down
  float *q, *kv, *latents, *values;     // attention: queries, latent and rope key; queries for latents, the result
  float *gate_up, *h, *scores;          // MLP and router
  float *taken, *expert_out, *weights;  // an expert's tokens and results; the weights of its choices
  int64_t* chosen;                      // [TOKENS][K]
  float* rstd;                          // [TOKENS]
  float* memory;                        // for attention and routing

  Work(const Model& m, int64_t capacity, Carver& carver) {
    const auto rows = [&](int64_t width) { return carver.floats(TOKENS * width); };
    const int64_t mlp = widest_mlp(m);
    stream = rows(m.width), x = rows(m.width), delta = rows(m.width);
    low = rows(largest(m.query_rank, largest(m.embedding_rank, m.head_width)));
    q = rows(m.heads * (m.nope + m.rope)), kv = rows(m.latent_rank + m.rope);
    latents = rows(m.heads * m.latent_rank), values = rows(m.heads * m.value);
    gate_up = rows(2 * mlp), h = rows(mlp), scores = rows(m.experts);
    taken = rows(m.width), expert_out = rows(m.width), weights = rows(m.chosen);
    chosen = carver.of<int64_t>(TOKENS * m.chosen);
    rstd = rows(1);
    memory = carver.floats(largest(attention_of(m).memory(capacity), choice_of(m).memory()));
  }
};

// Up to TOKENS tokens on their way through the layers.
struct Block {
  const Model& m;
  const Cache& cache;
  const Tokens& tokens;
  const Work& w;
  int64_t first, count;

  void embed(const ModelWeights& weights) const;
  void norm(const float* x, int64_t width, int64_t row, const float* weight, float eps, float* y) const;
  // x: the rotary parts of each token's heads, the given strides apart; in place
  void turn(float* x, int64_t token, int64_t head, int64_t heads) const;
  // w.x -> w.delta
  void attention(const Layer& layer, const LayerWeights& weights, int64_t number) const;
  // w.latents: from the queries without position, and for the values
  void attend(const LayerWeights& weights, int64_t number) const;
  void mlp(int64_t rows, const Packed<float>& gate_up, const Packed<float>& down, const float* x, float* y) const;
  void route(const Layer& layer, const LayerWeights& weights) const;
  void expert(const LayerWeights& weights, int64_t e) const;
  void feed_forward(const Layer& layer, const LayerWeights& weights) const;
  // The state after the last token of each sequence goes to hidden [rows][head_width].
  void run(Packing packing, float* hidden) const;
};

void Block::embed(const ModelWeights& weights) const {
  float* rows = m.projection == nullptr ? w.stream : w.low;
  for (int64_t i = 0; i < count; ++i)
    copy(m.table + tokens.ids[first + i] * m.embedding_rank, rows + i * m.embedding_rank, m.embedding_rank);
  if (m.projection != nullptr) product(count, {rows, m.embedding_rank, 1}, weights.projection.at(), w.stream, m.width);
}

void Block::norm(const float* x, int64_t width, int64_t row, const float* weight, float eps, float* y) const {
  rms_norm_rows(x, row, nullptr, 0, weight, eps, y, row, nullptr, w.rstd, count, width);
}

void Block::turn(float* x, int64_t token, int64_t head, int64_t heads) const {
  rope_rows(x, token, head, m.cos, m.sin, tokens.positions + first, x, token, head, count, heads, m.rope, false);
}

void Block::attention(const Layer& layer, const LayerWeights& weights, int64_t number) const {
  const int64_t head = m.nope + m.rope, q_row = m.heads * head, kv_row = m.latent_rank + m.rope;
  Matrix compressed = {w.x, m.width, 1};
  if (m.query_rank > 0) {
    product(count, compressed, weights.q_a.at(), w.low, m.query_rank);
    norm(w.low, m.query_rank, m.query_rank, layer.q_a_norm, m.latent_eps, w.low);
    compressed = {w.low, m.query_rank, 1};
  }
  product(count, compressed, weights.q.at(), w.q, q_row);
  turn(w.q + m.nope, q_row, head, m.heads);
  product(count, {w.x, m.width, 1}, weights.kv_a.at(), w.kv, kv_row);
  norm(w.kv, m.latent_rank, kv_row, layer.kv_a_norm, m.latent_eps, w.kv);
  turn(w.kv + m.latent_rank, kv_row, 0, 1);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t here = cache.place(number, tokens.rows[first + i], tokens.positions[first + i]);
    copy(w.kv + i * kv_row, cache.latent + here * m.latent_rank, m.latent_rank);
    copy(w.kv + i * kv_row + m.latent_rank, cache.k_rope + here * m.rope, m.rope);
  }
  attend(weights, number);
  product(count, {w.values, m.heads * m.value, 1}, weights.o.at(), w.delta, m.width);
}

void Block::attend(const LayerWeights& weights, int64_t number) const {
  const LatentAttention z = attention_of(m);
  const int64_t head = m.nope + m.rope, q_row = m.heads * head, row = m.heads * m.latent_rank;
  for (int64_t h = 0; h < m.heads; ++h)
    product(count, {w.q + h * head, q_row, 1}, weights.up_key.at(h), w.latents + h * m.latent_rank, row);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t begin = cache.place(number, tokens.rows[first + i], 0);
    const Cached cached = {cache.latent + begin * m.latent_rank, cache.k_rope + begin * m.rope,
                           tokens.positions[first + i] + 1};
    float* latents = w.latents + i * row;
    attend_one(z, cached, {latents, m.latent_rank, w.q + i * q_row + m.nope, head}, latents, w.memory);
  }
  for (int64_t h = 0; h < m.heads; ++h)
    product(count, {w.latents + h * m.latent_rank, row, 1}, weights.up_value.at(h), w.values + h * m.value,
            m.heads * m.value);
}

void Block::mlp(int64_t rows, const Packed<float>& gate_up, const Packed<float>& down, const float* x, float* y) const {
  const int64_t width = down.K;
  product(rows, {x, m.width, 1}, gate_up, w.gate_up, 2 * width);
  for (int64_t i = 0; i < rows; ++i) {
    const float* gate = w.gate_up + 2 * i * width;
    swiglu(gate, gate + width, w.h + i * width, width);
  }
  product(rows, {w.h, width, 1}, down, y, m.width);
}

void Block::route(const Layer& layer, const LayerWeights& weights) const {
  product(count, {w.x, m.width, 1}, weights.router.at(), w.scores, m.experts);
  route_rows(choice_of(m), w.scores, layer.router_bias, count, w.weights, w.chosen, w.memory);
}

void Block::expert(const LayerWeights& weights, int64_t e) const {
  int64_t of[TOKENS], rows = 0;
  float weight[TOKENS];
  for (int64_t i = 0; i < count; ++i)
    for (int64_t k = 0; k < m.chosen; ++k)
      if (w.chosen[i * m.chosen + k] == e) {
        of[rows] = i;
        weight[rows++] = w.weights[i * m.chosen + k];
      }
  if (rows == 0) return;
  for (int64_t i = 0; i < rows; ++i) copy(w.x + of[i] * m.width, w.taken + i * m.width, m.width);
  mlp(rows, weights.experts_gate_up.at(e), weights.experts_down.at(e), w.taken, w.expert_out);
  for (int64_t i = 0; i < rows; ++i) {
    const float* out = w.expert_out + i * m.width;
    float* to = w.delta + of[i] * m.width;
    for_vectors(m.width,
                [&](int64_t d, int64_t n) { store_n(to + d, load_n(to + d, n) + load_n(out + d, n) * weight[i], n); });
  }
}

void Block::feed_forward(const Layer& layer, const LayerWeights& weights) const {
  if (layer.width > 0)
    mlp(count, weights.gate_up.at(), weights.down.at(), w.x, w.delta);
  else
    clear(w.delta, count * m.width);
  if (layer.router == nullptr) return;
  route(layer, weights);
  for (int64_t e = 0; e < m.experts; ++e) expert(weights, e);
}

void Block::run(Packing packing, float* hidden) const {
  const ModelWeights weights(m, packing);
  embed(weights);
  for (int64_t number = 0; number < m.layer_count; ++number) {
    const Layer& layer = m.layers[number];
    const LayerWeights its(m, layer, packing);
    norm(w.stream, m.width, m.width, layer.input_norm, m.eps, w.x);
    attention(layer, its, number);
    add(w.delta, w.stream, count * m.width);
    norm(w.stream, m.width, m.width, layer.mlp_norm, m.eps, w.x);
    feed_forward(layer, its);
    add(w.delta, w.stream, count * m.width);
  }
  norm(w.stream, m.width, m.width, m.norm, m.eps, w.x);
  if (m.head_projection != nullptr)
    product(count, {w.x, m.width, 1}, weights.head_projection.at(), w.low, m.head_width);
  const float* state = m.head_projection == nullptr ? w.x : w.low;
  for (int64_t i = 0; i < count; ++i)
    if (tokens.ends_row(first + i))
      copy(state + i * m.head_width, hidden + tokens.rows[first + i] * m.head_width, m.head_width);
}

// Every thread takes whole sequences: no two work on the cache of one.
void run_layers(const Model& m, float* panels, const Cache& cache, const Tokens& tokens, float* hidden, int threads) {
  const auto next_row = [&](int64_t n) {
    while (n > 0 && n < tokens.count && !tokens.ends_row(n - 1)) ++n;
    return n;
  };
  parallel_ranges(tokens.count, threads, [&](int, int64_t begin, int64_t end) {
    begin = next_row(begin), end = next_row(end);
    const auto w = carved(dsfast::ACTIVATIONS, [&](Carver& c) { return Work(m, cache.capacity, c); });
    for (int64_t first = begin; first < end; first += TOKENS)
      Block{m, cache, tokens, w, first, least(end - first, TOKENS)}.run({{panels}}, hidden);
  });
}

// The largest logit of each row so far and its word.
struct Best {
  float* value;
  int64_t* word;
};

// Most chunks hold no better word, and in one that does most vectors do not.
void keep_best(const float* logits, int64_t word, int64_t count, float& value, int64_t& at) {
  const auto better = [&](int64_t i, int64_t n) { return ~(load_n(logits + i, n) <= value); };
  vint found = {};
  for_vectors(count, [&](int64_t i, int64_t n) { found |= better(i, n); });
  if (!any(found) || value != value) return;
  for_vectors(count, [&](int64_t i, int64_t n) {
    if (!any(better(i, n))) return;
    for (int64_t j = i; j < i + n; ++j)
      if (larger(logits[j], value)) {
        value = logits[j];
        at = word + j;
      }
  });
}

// chosen [rows]: the word of the largest logit, the lowest of equals; -1 where the largest is not finite, as NaN is.
void choose_greedily(const Model& m, const Packed<float>& head, const float* hidden, int64_t rows, int64_t* chosen,
                     int threads) {
  Best found[MAX_THREADS] = {};
  parallel_ranges((m.vocabulary + WORDS - 1) / WORDS, threads, [&](int thread, int64_t begin, int64_t end) {
    Carver memory = {dsfast::scratch(TOKENS * WORDS + 3 * rows + 4 * LINE, dsfast::ACTIVATIONS)};
    float* logits = memory.floats(TOKENS * WORDS);
    const Best best = found[thread] = {memory.floats(rows), memory.of<int64_t>(rows)};
    for (int64_t row = 0; row < rows; ++row) {
      best.value[row] = -INFINITY;
      best.word[row] = begin * WORDS;
    }
    for (int64_t word = begin * WORDS; word < least(end * WORDS, m.vocabulary); word += WORDS) {
      Packed<float> words = head.columns_from(word);
      words.N = least(words.N, WORDS);
      for (int64_t first = 0; first < rows; first += TOKENS) {
        const int64_t some = least(rows - first, TOKENS);
        product(some, {hidden + first * m.head_width, m.head_width, 1}, words, logits, WORDS);
        for (int64_t i = 0; i < some; ++i)
          keep_best(logits + i * WORDS, word, words.N, best.value[first + i], best.word[first + i]);
      }
    }
  });
  for (int64_t row = 0; row < rows; ++row) {
    chosen[row] = found[0].word[row];
    float high = found[0].value[row];
    for (int t = 1; t < MAX_THREADS && found[t].value != nullptr; ++t)
      if (larger(found[t].value[row], high)) {
        high = found[t].value[row];
        chosen[row] = found[t].word[row];
      }
    if (!std::isfinite(high)) chosen[row] = -1;
  }
}

// logits [rows][V]
void write_logits(const Model& m, const Packed<float>& head, const float* hidden, int64_t rows, float* out,
                  int threads) {
  parallel_ranges((m.vocabulary + NR - 1) / NR, threads, [&](int, int64_t begin, int64_t end) {
    Packed<float> words = head.columns_from(begin * NR);
    words.N = least(words.N, (end - begin) * NR);
    product(rows, {hidden, m.head_width, 1}, words, out + begin * NR, m.vocabulary);
  });
}

// The first word whose share of softmax(logits / temperature), summed up to it, is above `uniform`; -1 where the sum is
// not finite. The exponentials are float32, as the logits are; their sums are double. memory [V].
int64_t sample(const float* logits, int64_t V, double temperature, double uniform, float* memory) {
  const double high = logits[best(logits, V)];
  // No temperature, however small, makes the largest overflow: its difference is 0.
  for (int64_t v = 0; v < V; ++v) memory[v] = float((double(logits[v]) - high) / temperature);
  for_vectors(V, [&](int64_t v, int64_t n) { store_n(memory + v, exp(load_n(memory + v, n)), n); });
  double total = 0, reached = 0;
  for (int64_t v = 0; v < V; ++v) total += double(memory[v]);
  if (!std::isfinite(total)) return -1;
  for (int64_t v = 0; v < V; ++v) {
    reached += double(memory[v]);
    if (reached > uniform * total) return v;
  }
  return V - 1;
}

}  // namespace

int64_t decode_panels(const Model* model, float* memory, int threads) {
  const auto go_through = [&](Packing packing) {
    ModelWeights(*model, packing);
    for (int64_t i = 0; i < model->layer_count; ++i) LayerWeights(*model, model->layers[i], packing);
    return packing.memory.size;
  };
  if (memory != nullptr)
    parallel_ranges(threads, threads, [&](int, int64_t begin, int64_t end) {
      for (int64_t share = begin; share < end; ++share) go_through({{memory}, share, threads});
    });
  return go_through({});
}

int64_t decode_step(const Model* model, float* panels, float* latent, float* k_rope, int64_t rows, int64_t capacity,
                    const int64_t* ids, const int64_t* token_rows, const int64_t* positions, int64_t N, float* hidden,
                    float* logits, const double* uniforms, double temperature, int64_t* chosen, int threads) {
  const Model& m = *model;
  Packing packing = {{panels}};
  const Packed<float> head = ModelWeights(m, packing).head.at();
  run_layers(m, panels, {latent, k_rope, rows, capacity}, {ids, token_rows, positions, N}, hidden, threads);
  if (uniforms == nullptr) {
    choose_greedily(m, head, hidden, rows, chosen, threads);
  } else {
    write_logits(m, head, hidden, rows, logits, threads);
    parallel_ranges(rows, threads, [&](int, int64_t begin, int64_t end) {
      float* memory = dsfast::scratch(m.vocabulary);
      for (int64_t row = begin; row < end; ++row)
        chosen[row] = sample(logits + row * m.vocabulary, m.vocabulary, temperature, uniforms[row], memory);
    });
  }
  int64_t bad = 0;
  for (int64_t row = 0; row < rows; ++row) bad += chosen[row] < 0;
  return bad;
}

}  // namespace DSFAST_ISA
