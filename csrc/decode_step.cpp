// A whole model's step for N tokens in one call: each writes its latent to the cache, attends to what its sequence
// holds up to itself, and the state after the last token of each sequence chooses the next. See
// dsfast/model/native_decode.py.
#include "kernels.h"
#include "latent_attention.h"
#include "model.h"
#include "parallel.h"
#include "route.h"

namespace DSFAST_ISA {
namespace {

using dsfast::Layer;
using dsfast::Model;

constexpr int64_t WORDS = 96;  // of the vocabulary whose logits are made at a time: they stay in the first-level cache

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
  return {m.heads, m.latent_rank, m.nope, m.rope, m.value, m.latent_rank, m.rope, m.softmax_scale};
}

Choice choice_of(const Model& m) {
  return {m.experts, m.chosen, m.groups, m.chosen_groups, m.norm_topk_prob, m.routed_scaling};
}

int64_t widest_mlp(const Model& m) {
  int64_t width = m.expert_width;
  for (int64_t i = 0; i < m.layer_count; ++i) width = largest(width, m.layers[i].width);
  return width;
}

// A thread's working memory; all but the last two are [width][lanes].
struct Work {
  float *stream, *x, *delta, *cos, *sin;
  float *low, *q, *kv, *values;         // attention: queries before q_b, queries, latent and rope key, its result
  float *gate_up, *h, *scores;          // MLP and router
  float *taken, *expert_out, *weights;  // an expert's tokens and results; the weights of its choices
  int64_t* chosen;                      // [lanes][K]
  float* memory;                        // for attention and routing
  int64_t size = 0;

  Work(const Model& m, int64_t capacity, float* base) {
    const auto carve = [&](int64_t count) {
      float* part = base == nullptr ? nullptr : base + size;
      size += (count + 15) / 16 * 16;
      return part;
    };
    const int64_t mlp = widest_mlp(m);
    stream = carve(m.width * NR), x = carve(m.width * NR), delta = carve(m.width * NR);
    cos = carve(m.rope / 2 * NR), sin = carve(m.rope / 2 * NR);
    low = carve(largest(m.query_rank, largest(m.embedding_rank, m.head_width)) * NR);
    q = carve(m.heads * (m.nope + m.rope) * NR), kv = carve((m.latent_rank + m.rope) * NR);
    values = carve(m.heads * m.value * NR);
    gate_up = carve(2 * mlp * NR), h = carve(mlp * NR), scores = carve(m.experts * NR);
    taken = carve(m.width * NR), expert_out = carve(m.width * NR), weights = carve(m.chosen * NR);
    chosen = reinterpret_cast<int64_t*>(carve(2 * m.chosen * NR));
    memory = carve(largest(attention_of(m).memory(capacity), choice_of(m).memory() + 2 * m.chosen * W));
  }
};

// Up to NR tokens, one in each lane, on their way through the layers.
struct Block {
  const Model& m;
  const Cache& cache;
  const Tokens& tokens;
  Work& w;
  int64_t first, count, lanes;

  void embed() const;
  void look_up_turns() const;
  // x [Dr][lanes], in place
  void turn(float* x) const;
  // w.x -> w.delta
  void attention(const Layer& layer, int64_t number) const;
  void mlp(int64_t width, const float* gate_up, const float* down, const float* x, float* y, int64_t in_lanes) const;
  void route(const Layer& layer) const;
  // Adds expert e's share to w.delta, for the lanes that chose it.
  void expert(const Layer& layer, int64_t e) const;
  // w.x -> w.delta
  void feed_forward(const Layer& layer) const;
  // The state after the last token of each sequence goes to hidden [rows][head_width].
  void run(float* hidden) const;
};

void Block::embed() const {
  float* rows = m.projection == nullptr ? w.stream : w.low;
  if (count < lanes) clear(rows, m.embedding_rank * lanes);
  for (int64_t i = 0; i < count; ++i)
    put_lane(m.table + tokens.ids[first + i] * m.embedding_rank, m.embedding_rank, rows, lanes, i);
  if (m.projection != nullptr) product_transposed(m.width, m.embedding_rank, m.projection, rows, w.stream, lanes);
}

void Block::look_up_turns() const {
  const int64_t pairs = m.rope / 2;
  if (count < lanes) clear(w.cos, pairs * lanes), clear(w.sin, pairs * lanes);
  for (int64_t i = 0; i < count; ++i) {
    put_lane(m.cos + tokens.positions[first + i] * pairs, pairs, w.cos, lanes, i);
    put_lane(m.sin + tokens.positions[first + i] * pairs, pairs, w.sin, lanes, i);
  }
}

void Block::turn(float* x) const {
  for (int64_t pair = 0; pair < m.rope / 2; ++pair, x += 2 * lanes)
    for_vectors(lanes, [&](int64_t lane, int64_t n) {
      const vfloat even = load_n(x + lane, n), odd = load_n(x + lanes + lane, n);
      const vfloat c = load_n(w.cos + pair * lanes + lane, n), s = load_n(w.sin + pair * lanes + lane, n);
      store_n(x + lane, even * c - odd * s, n);
      store_n(x + lanes + lane, even * s + odd * c, n);
    });
}

void Block::attention(const Layer& layer, int64_t number) const {
  const LatentAttention z = attention_of(m);
  const float* compressed = w.x;
  if (m.query_rank > 0) {
    product(m.query_rank, m.width, layer.q_a, w.x, w.low, lanes);
    rms_norm_lanes(m.query_rank, layer.q_a_norm, m.latent_eps, w.low, w.low, lanes);
    compressed = w.low;
  }
  const int64_t head_width = m.nope + m.rope;
  product(m.heads * head_width, m.query_rank > 0 ? m.query_rank : m.width, layer.q, compressed, w.q, lanes);
  for (int64_t h = 0; h < m.heads; ++h) turn(w.q + (h * head_width + m.nope) * lanes);
  product(m.latent_rank + m.rope, m.width, layer.kv_a, w.x, w.kv, lanes);
  rms_norm_lanes(m.latent_rank, layer.kv_a_norm, m.latent_eps, w.kv, w.kv, lanes);
  turn(w.kv + m.latent_rank * lanes);
  Cached cached[NR];
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = tokens.rows[first + i], position = tokens.positions[first + i];
    const int64_t begin = cache.place(number, row, 0), here = begin + position;
    take_lane(w.kv, lanes, i, m.latent_rank, cache.latent + here * m.latent_rank);
    take_lane(w.kv + m.latent_rank * lanes, lanes, i, m.rope, cache.k_rope + here * m.rope);
    cached[i] = {cache.latent + begin * m.latent_rank, cache.k_rope + begin * m.rope, position + 1};
  }
  attend_block(z, w.q, layer.kv_b, cached, count, lanes, w.values, w.memory);
  product(m.width, m.heads * m.value, layer.o, w.values, w.delta, lanes);
}

void Block::mlp(int64_t width, const float* gate_up, const float* down, const float* x, float* y,
                int64_t in_lanes) const {
  product(2 * width, m.width, gate_up, x, w.gate_up, in_lanes);
  swiglu(w.gate_up, w.gate_up + width * in_lanes, w.h, width * in_lanes);
  product(m.width, width, down, w.h, y, in_lanes);
}

void Block::route(const Layer& layer) const {
  const Choice z = choice_of(m);
  float* weights = w.memory + z.memory();
  int32_t* chosen = reinterpret_cast<int32_t*>(weights + m.chosen * W);
  product(m.experts, m.width, layer.router, w.x, w.scores, lanes);
  for_vectors(m.experts * lanes,
              [&](int64_t i, int64_t n) { store_n(w.scores + i, sigmoid(load_n(w.scores + i, n)), n); });
  for (int64_t i = 0; i < count; i += W) {
    route_lanes(z, w.scores + i, lanes, layer.router_bias, weights, chosen, w.memory);
    to_rows(weights, m.chosen, least(count - i, W), w.weights + i * m.chosen);
    to_rows(chosen, m.chosen, least(count - i, W), w.chosen + i * m.chosen);
  }
}

void Block::expert(const Layer& layer, int64_t e) const {
  int64_t of[NR], in_group = 0;
  float weight[NR];
  for (int64_t i = 0; i < count; ++i)
    for (int64_t k = 0; k < m.chosen; ++k)
      if (w.chosen[i * m.chosen + k] == e) {
        of[in_group] = i;
        weight[in_group++] = w.weights[i * m.chosen + k];
      }
  if (in_group == 0) return;
  const int64_t group_lanes = lanes_for(in_group), size = m.expert_width * m.width;
  if (in_group < group_lanes) clear(w.taken, m.width * group_lanes);
  for (int64_t d = 0; d < m.width; ++d)
    for (int64_t g = 0; g < in_group; ++g) w.taken[d * group_lanes + g] = w.x[d * lanes + of[g]];
  mlp(m.expert_width, layer.experts_gate_up + 2 * e * size, layer.experts_down + e * size, w.taken, w.expert_out,
      group_lanes);
  for (int64_t d = 0; d < m.width; ++d)
    for (int64_t g = 0; g < in_group; ++g) w.delta[d * lanes + of[g]] += w.expert_out[d * group_lanes + g] * weight[g];
}

void Block::feed_forward(const Layer& layer) const {
  if (layer.width > 0)
    mlp(layer.width, layer.gate_up, layer.down, w.x, w.delta, lanes);
  else
    clear(w.delta, m.width * lanes);
  if (layer.router == nullptr) return;
  route(layer);
  for (int64_t e = 0; e < m.experts; ++e) expert(layer, e);
}

void Block::run(float* hidden) const {
  embed();
  look_up_turns();
  for (int64_t number = 0; number < m.layer_count; ++number) {
    const Layer& layer = m.layers[number];
    rms_norm_lanes(m.width, layer.input_norm, m.eps, w.stream, w.x, lanes);
    attention(layer, number);
    add(w.delta, w.stream, m.width * lanes);
    rms_norm_lanes(m.width, layer.mlp_norm, m.eps, w.stream, w.x, lanes);
    feed_forward(layer);
    add(w.delta, w.stream, m.width * lanes);
  }
  rms_norm_lanes(m.width, m.norm, m.eps, w.stream, w.x, lanes);
  if (m.head_projection != nullptr) product(m.head_width, m.width, m.head_projection, w.x, w.low, lanes);
  const float* state = m.head_projection == nullptr ? w.x : w.low;
  for (int64_t i = 0; i < count; ++i)
    if (tokens.ends_row(first + i))
      take_lane(state, lanes, i, m.head_width, hidden + tokens.rows[first + i] * m.head_width);
}

// Every thread takes whole sequences: no two work on the cache of one.
void run_layers(const Model& m, const Cache& cache, const Tokens& tokens, float* hidden, int threads) {
  const auto next_row = [&](int64_t n) {
    while (n > 0 && n < tokens.count && !tokens.ends_row(n - 1)) ++n;
    return n;
  };
  parallel_ranges(tokens.count, threads, [&](int, int64_t begin, int64_t end) {
    begin = next_row(begin), end = next_row(end);
    Work w(m, cache.capacity, dsfast::scratch(Work(m, cache.capacity, nullptr).size));
    for (int64_t first = begin; first < end; first += NR) {
      const int64_t count = least(end - first, NR);
      Block{m, cache, tokens, w, first, count, lanes_for(count)}.run(hidden);
    }
  });
}

// hidden [rows][width] -> blocks of NR rows, [width][lanes] one behind the other; f(block, first row, lanes) for each.
template <class F>
void for_row_lanes(float* blocks, int64_t rows, int64_t width, F f) {
  for (int64_t first = 0; first < rows; first += NR)
    f(blocks + first * width, first, lanes_for(least(rows - first, NR)));
}

int64_t padded_rows(int64_t rows) { return (rows + NR - 1) / NR * NR; }

// f(words, first word, count, block, first row, lanes): the logits [count][lanes] of WORDS words at a time for NR rows.
template <class F>
void for_logits(const Model& m, const float* hidden, int64_t rows, int64_t begin, int64_t end, float* memory, F f) {
  float *logits = memory, *blocks = logits + WORDS * NR;
  if (rows > 1) clear(blocks, padded_rows(rows) * m.head_width);
  for_row_lanes(blocks, rows, m.head_width, [&](float* block, int64_t first, int64_t lanes) {
    for (int64_t i = 0; i < least(rows - first, NR); ++i)
      put_lane(hidden + (first + i) * m.head_width, m.head_width, block, lanes, i);
  });
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t word = chunk * WORDS, count = least(m.vocabulary - word, WORDS);
    for_row_lanes(blocks, rows, m.head_width, [&](float* block, int64_t first, int64_t lanes) {
      product(count, m.head_width, m.head + word * m.head_width, block, logits, lanes);
      f(logits, word, count, first, lanes);
    });
  }
}

int64_t logits_memory(const Model& m, int64_t rows) { return WORDS * NR + padded_rows(rows) * m.head_width; }

// The largest logit of each row so far and its word.
struct Best {
  float* value;
  int32_t* word;
};

void keep_best(const float* logits, int64_t word, int64_t count, int64_t lanes, Best best) {
  if (lanes == 1) {
    vint better = {};  // most chunks hold no better word: W words at a time tell
    for_vectors(count, [&](int64_t i, int64_t n) {
      better |= ~(load_n(logits + i, n) <= best.value[0]) & (splat(best.value[0]) == splat(best.value[0]));
    });
    const bool found = any(better);
    for (int64_t i = 0; found && i < count; ++i)
      if (larger(logits[i], best.value[0])) {
        best.value[0] = logits[i];
        best.word[0] = int32_t(word + i);
      }
    return;
  }
  for (int64_t lane = 0; lane < lanes; lane += W) {
    vfloat high = load(best.value + lane);
    vint at;
    for (int i = 0; i < W; ++i) at[i] = best.word[lane + i];
    for (int64_t i = 0; i < count; ++i) {
      const vfloat value = load(logits + i * lanes + lane);
      const vint better = ~(value <= high) & (high == high);  // `larger`
      high = better ? value : high;
      at = better ? vint{} + int32_t(word + i) : at;
    }
    store(best.value + lane, high);
    for (int i = 0; i < W; ++i) best.word[lane + i] = at[i];
  }
}

// chosen [rows]: the word of the largest logit, the lowest of equals; NaN counts as the largest.
void choose_greedily(const Model& m, const float* hidden, int64_t rows, int64_t* chosen, int threads) {
  Best found[MAX_THREADS] = {};
  const int64_t padded = padded_rows(rows);
  parallel_ranges((m.vocabulary + WORDS - 1) / WORDS, threads, [&](int thread, int64_t begin, int64_t end) {
    float* memory = dsfast::scratch(2 * padded + logits_memory(m, rows));
    const Best best = found[thread] = {memory, reinterpret_cast<int32_t*>(memory + padded)};
    for (int64_t i = 0; i < padded; ++i) {
      best.value[i] = -INFINITY;
      best.word[i] = int32_t(begin * WORDS);
    }
    for_logits(m, hidden, rows, begin, end, memory + 2 * padded,
               [&](const float* logits, int64_t word, int64_t count, int64_t first, int64_t lanes) {
                 keep_best(logits, word, count, lanes, {best.value + first, best.word + first});
               });
  });
  for (int64_t row = 0; row < rows; ++row) {
    chosen[row] = found[0].word[row];
    float high = found[0].value[row];
    for (int t = 1; t < MAX_THREADS && found[t].value != nullptr; ++t)
      if (larger(found[t].value[row], high)) {
        high = found[t].value[row];
        chosen[row] = found[t].word[row];
      }
  }
}

// logits [rows][V]
void write_logits(const Model& m, const float* hidden, int64_t rows, float* out, int threads) {
  parallel_ranges((m.vocabulary + WORDS - 1) / WORDS, threads, [&](int, int64_t begin, int64_t end) {
    for_logits(m, hidden, rows, begin, end, dsfast::scratch(logits_memory(m, rows)),
               [&](const float* logits, int64_t word, int64_t count, int64_t first, int64_t lanes) {
                 for (int64_t i = 0; i < least(rows - first, lanes); ++i)
                   take_lane(logits, lanes, i, count, out + (first + i) * m.vocabulary + word);
               });
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

int64_t decode_step(const Model* model, float* latent, float* k_rope, int64_t rows, int64_t capacity,
                    const int64_t* ids, const int64_t* token_rows, const int64_t* positions, int64_t N, float* hidden,
                    float* logits, const double* uniforms, double temperature, int64_t* chosen, int threads) {
  const Model& m = *model;
  run_layers(m, {latent, k_rope, rows, capacity}, {ids, token_rows, positions, N}, hidden, threads);
  if (uniforms == nullptr) {
    choose_greedily(m, hidden, rows, chosen, threads);
    return 0;
  }
  write_logits(m, hidden, rows, logits, threads);
  parallel_ranges(rows, threads, [&](int, int64_t begin, int64_t end) {
    float* memory = dsfast::scratch(m.vocabulary);
    for (int64_t row = begin; row < end; ++row)
      chosen[row] = sample(logits + row * m.vocabulary, m.vocabulary, temperature, uniforms[row], memory);
  });
  int64_t bad = 0;
  for (int64_t row = 0; row < rows; ++row) bad += chosen[row] < 0;
  return bad;
}

}  // namespace DSFAST_ISA
