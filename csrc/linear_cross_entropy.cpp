// The head's loss and gradients from blocks of logits; see dsfast/ops/linear_cross_entropy.py.
//
// A block of tokens meets the vocabulary chunk by chunk. Logits are kept transposed, [words][TOKENS]: the tokens lie in
// the lanes, so that maximum, exp and sum need no work across lanes. While a chunk is in the nearest caches its
// exponentials give their part of dhidden; kept for the whole vocabulary, they give dweight once their sum is known.
// They are made into terms of these two products as they come, of a narrow head out of the registers its logits are
// summed in.
#include <cmath>

#include "carver.h"
#include "gemm.h"
#include "kernels.h"
#include "parallel.h"
#include "pieces.h"

namespace DSFAST_ISA {
namespace {

// TOKENS at a time: the more, the less often weights and their gradient are read, the fewer, the nearer are the
// exponentials of all words.
constexpr int64_t OF_NARROW = 2 * NR, OF_WIDE = 4 * NR;
constexpr int64_t PER = PER_TERM<BuildTerm>;
static_assert(HeadWeight::NARROW % PER == 0 && HeadWeight::WIDE % PER == 0 && NR % PER == 0,
              "a chunk must fill whole terms");
// A sum of exponentials above this says that a logit lies some 40 above the reference that is subtracted before exp:
// far from overflow, also summed over the words.
constexpr float FAR = 2e17f;

// 2^(logit / ln 2 - reference) of a chunk of words, as the terms of the products they go into.
template <int64_t TOKENS>
struct Chunk {
  BuildTerm* by_token;  // [words][TOKENS / PER], terms along the tokens; null: no terms are wanted
  BuildTerm* by_word;   // [words / PER][TOKENS], terms along the words
  float* logits;        // [words][TOKENS]
};

template <int64_t TOKENS>
struct Block {
  BuildTerm* by_token;                     // [V][TOKENS / PER], the exponentials of all words; null without gradients
  Chunk<TOKENS> passing;                   // memory for what is kept of one chunk only
  float* hidden;                           // [R][TOKENS], transposed
  float* scaled;                           // [TOKENS][R], hidden times the token's gradient scale
  float* grad;                             // [TOKENS][R], sum of exps times weight
  BuildTerm *hidden_terms, *scaled_terms;  // second factors
  BuildTerm *label_terms, *row;            // [terms of R][TOKENS], the weight of each token's label; of one
  PackedB packed_hidden;
  float reference[TOKENS], total[TOKENS];  // what is subtracted, in base 2; the sum of the exponentials

  Block(Carver& c, const HeadWeight& head, bool with_grads) {
    const int64_t chunk = head.chunk();
    by_token = with_grads ? c.of<BuildTerm>(terms_of<BuildTerm>(head.V) * TOKENS) : nullptr;
    passing = {nullptr, c.of<BuildTerm>(chunk * TOKENS / PER), c.floats(chunk * TOKENS)};
    hidden = c.floats(head.R * TOKENS), scaled = c.floats(head.R * TOKENS), grad = c.floats(head.R * TOKENS);
    hidden_terms = c.of<BuildTerm>(packed_size<BuildTerm>(TOKENS, head.R));
    scaled_terms = c.of<BuildTerm>(packed_size<BuildTerm>(head.R, TOKENS));
    label_terms = c.of<BuildTerm>(terms_of<BuildTerm>(head.R) * TOKENS);
    row = c.of<BuildTerm>(packed_a_size(1, head.R));
  }

  // The words from v on. Floats have one place from logit to term.
  Chunk<TOKENS> chunk(int64_t v) const {
    if (by_token == nullptr) return passing;
    BuildTerm* own = by_token + v * (TOKENS / PER);
    if (PER == 1) return {own, own, reinterpret_cast<float*>(own)};
    return {own, passing.by_word, passing.logits};
  }
};

template <int64_t TOKENS>
void load_hidden(const HeadWeight& head, const float* hidden, int64_t row, int64_t tokens, Block<TOKENS>& b) {
  for (int64_t r = 0; r < head.R; ++r)
    for (int64_t i = 0; i < TOKENS; ++i) b.hidden[r * TOKENS + i] = i < tokens ? hidden[i * row + r] : 0.0f;
  b.packed_hidden = pack_b(TOKENS, head.R, {b.hidden, TOKENS, 1}, b.hidden_terms);
}

template <int64_t TOKENS>
void make_logits(const HeadWeight& head, int64_t v, int64_t words, const Block<TOKENS>& b, float* logits) {
  if (head.narrow())
    gemm(words, head.rows(v), b.packed_hidden, logits, TOKENS);
  else
    gemm(words, head.words(v), b.packed_hidden, logits, TOKENS);
}

// The largest logits of the first `words` words become what is subtracted before exp.
template <int64_t TOKENS>
void set_reference(const HeadWeight& head, int64_t words, Block<TOKENS>& b) {
  for (int64_t t = 0; t < TOKENS; ++t) b.reference[t] = -INFINITY;
  float* logits = b.passing.logits;
  for (int64_t v = 0; v < words; v += head.chunk()) {
    const int64_t count = least(words - v, head.chunk());
    make_logits(head, v, count, b, logits);
    for (int64_t t = 0; t < TOKENS; t += W) {
      vfloat top = load(b.reference + t);
      for (int64_t i = 0; i < count; ++i) top = maximum(top, load(logits + i * TOKENS + t) * PER_LN2);
      store(b.reference + t, top);
    }
  }
}

// PER_TERM logits of W tokens each, from word i and token t of the chunk on, `count` of which are there -> their
// exponentials; their sum is added to `part`.
template <int64_t TOKENS, class Logits>
DSFAST_INLINE void exponentials(const Logits& logit, int64_t count, vfloat reference, const Chunk<TOKENS>& chunk,
                                int64_t i, int64_t t, vfloat& part) {
  vfloat exps[PER] = {};
#pragma GCC unroll 2
  for (int64_t p = 0; p < PER; ++p)
    if (p < count) part += exps[p] = exp2_of(logit(p) * PER_LN2 - reference);
  if (chunk.by_token != nullptr)
    store_terms(exps, chunk.by_token + (i * TOKENS + t) / PER, TOKENS / PER, chunk.by_word + i / PER * TOKENS + t);
}

// Adds the exponentials of a chunk to their tokens' total, summed by chunk first: fewer roundings than one long sum.
// False where a sum says that a logit lies far above the reference.
template <int64_t TOKENS>
DSFAST_INLINE bool add_up(Block<TOKENS>& b, int64_t t, vfloat part) {
  store(b.total + t, load(b.total + t) + part);
  return !any(part > FAR);
}

// Logits of a chunk -> their exponentials.
template <int64_t TOKENS>
bool exponentials_of_logits(const Chunk<TOKENS>& chunk, int64_t words, Block<TOKENS>& b) {
  bool near = true;
  for (int64_t t = 0; t < TOKENS; t += W) {
    const vfloat reference = load(b.reference + t);
    vfloat part = {};
    for (int64_t i = 0; i < words; i += PER)
      exponentials([&](int64_t p) { return load(chunk.logits + (i + p) * TOKENS + t); }, words - i, reference, chunk, i,
                   t, part);
    near &= add_up(b, t, part);
  }
  return near;
}

// The same without logits in memory, where the head is narrow.
template <int64_t TOKENS>
bool exponentials_of_sums(const HeadWeight& head, int64_t v, const Chunk<TOKENS>& chunk, int64_t words,
                          Block<TOKENS>& b) {
  bool near = true;
  for (int64_t t = 0; t < TOKENS; t += NR) {
    const BuildTerm* hidden = b.packed_hidden.columns_from(t).terms;
    vfloat parts[2] = {};
    for_row_blocks(words, [&](auto rows, int64_t i) {
      vfloat sums[rows.value][2];
      tile_sums(terms_of<BuildTerm>(head.R), head.rows(v + i), hidden, NR, NR, sums);
#pragma GCC unroll 24
      for (int r = 0; r < rows.value; r += PER)
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j)
          exponentials([&](int64_t p) { return sums[r + p][j]; }, rows.value - r, load(b.reference + t + j * W), chunk,
                       i + r, t + j * W, parts[j]);
    });
    for (int j = 0; j < 2; ++j) near &= add_up(b, t + j * W, parts[j]);
  }
  return near;
}

template <int64_t TOKENS>
bool exponentials(const HeadWeight& head, int64_t v, const Chunk<TOKENS>& chunk, int64_t words, Block<TOKENS>& b) {
  if (head.narrow()) return exponentials_of_sums(head, v, chunk, words, b);
  make_logits(head, v, words, b, chunk.logits);
  return exponentials_of_logits(chunk, words, b);
}

// All words: exps, their total and, if wanted, grad. False as soon as a logit lies far above the reference.
template <int64_t TOKENS>
bool meet_vocabulary(const HeadWeight& head, bool with_grads, Block<TOKENS>& b) {
  clear(b.total, TOKENS);
  for (int64_t v = 0; v < head.V; v += head.chunk()) {
    const int64_t words = least(head.V - v, head.chunk());
    const Chunk<TOKENS> chunk = b.chunk(v);
    if (!exponentials(head, v, chunk, words, b)) return false;
    const Terms<BuildTerm> exps = {chunk.by_word, 1, TOKENS};
    if (with_grads && head.narrow()) gemm(TOKENS, exps, head.columns(v), b.grad, head.R, v > 0);
    if (with_grads && !head.narrow())
      gemm_packed<BuildTerm>(TOKENS, head.R, words, exps, head.words(v), b.grad, head.R, v > 0);
  }
  return true;
}

// Each token's logit of its label, summed in the same order as in `make_logits`: the same bits. Of a token whose label
// is ignored it is anything.
template <int64_t TOKENS>
void label_logits(const HeadWeight& head, const int64_t* labels, int64_t ignore_index, int64_t tokens,
                  const Block<TOKENS>& b, float* logits) {
  const int64_t terms = terms_of<BuildTerm>(head.R);
  for (int64_t t = 0; t < TOKENS; ++t) {
    const int64_t label = t < tokens && labels[t] != ignore_index ? labels[t] : 0;
    const BuildTerm* row = head.narrow() ? head.rows(label).data : packed_a(1, head.R, head.words(label), b.row).data;
    for (int64_t k = 0; k < terms; ++k) b.label_terms[k * TOKENS + t] = row[k];
  }
  for (int64_t t = 0; t < TOKENS; t += W) {
    const BuildTerm* hidden = b.packed_hidden.columns_from(t / NR * NR).terms + t % NR;
    vfloat logit = {};
    for (int64_t from = 0; from < terms; from += KC / PER) {
      vfloat part = {};
      for (int64_t k = from; k < least(from + KC / PER, terms); ++k)
        part = multiply_add(load(b.label_terms + k * TOKENS + t), load(hidden + k * NR), part);
      logit = from == 0 ? part : logit + part;
    }
    store(logits + t, logit);
  }
}

// With p = exp / total, share = 1 / (tokens that count): dhidden = share (p weight - weight[label]) and dweight
// += share (p^T hidden - hidden[label]).
template <int64_t TOKENS>
void gradients(const HeadWeight& head, const int64_t* labels, int64_t ignore_index, int64_t tokens, float share,
               float* dhidden, float* dweight, bool first, Block<TOKENS>& b) {
  const int64_t R = head.R;
  for (int64_t i = 0; i < TOKENS; ++i) {
    const bool counts = i < tokens && labels[i] != ignore_index;
    const float scale = counts ? share / b.total[i] : 0.0f;
    for (int64_t r = 0; r < R; ++r) b.scaled[i * R + r] = b.hidden[r * TOKENS + i] * scale;
    if (i >= tokens) continue;
    const float* of_label = head.numbers + (counts ? labels[i] * R : 0);
    for (int64_t r = 0; r < R; ++r)
      dhidden[i * R + r] = counts ? b.grad[i * R + r] * scale - of_label[r] * share : 0.0f;
  }
  const PackedB scaled = pack_b(R, TOKENS, {b.scaled, R, 1}, b.scaled_terms);
  for (int64_t v = 0; v < head.V; v += head.chunk())
    gemm(least(head.V - v, head.chunk()), Terms<BuildTerm>{b.chunk(v).by_token, TOKENS / PER, 1}, scaled,
         dweight + v * R, R, !first);
  for (int64_t i = 0; i < tokens; ++i)
    if (labels[i] != ignore_index)
      for (int64_t r = 0; r < R; ++r) dweight[labels[i] * R + r] -= b.hidden[r * TOKENS + i] * share;
}

// A token's loss. In bfloat16 the rounding of exp (see exp2 in simd.h) may take it below 0, where it cannot be.
double loss_of(float reference, float total, float of_label) {
  const double loss = double(reference) / PER_LN2 + std::log(double(total)) - double(of_label);
  return loss < 0 ? 0 : loss;
}

template <int64_t TOKENS>
double rows_by_blocks(const float* hidden, int64_t hidden_row, const HeadWeight& head, const int64_t* labels,
                      int64_t ignore_index, float share, float* dhidden, float* dweight, bool first, int64_t N) {
  const bool with_grads = dhidden != nullptr;
  auto b = carved(dsfast::OF_PIECES, [&](Carver& c) { return Block<TOKENS>(c, head, with_grads); });
  double loss = 0;
  for (int64_t n = 0; n < N; n += TOKENS) {
    const int64_t tokens = least(N - n, TOKENS);
    load_hidden(head, hidden + n * hidden_row, hidden_row, tokens, b);
    set_reference(head, least(head.V, head.chunk()), b);
    if (!meet_vocabulary(head, with_grads,
                         b)) {  // rare: the first chunk's largest logit is seldom far from the largest
      set_reference(head, head.V, b);
      meet_vocabulary(head, with_grads, b);
    }
    float of_label[TOKENS] = {};
    if (head.V > 0) label_logits(head, labels + n, ignore_index, tokens, b, of_label);
    for (int64_t i = 0; i < tokens; ++i)
      if (labels[n + i] != ignore_index) loss += loss_of(b.reference[i], b.total[i], of_label[i]);
    if (with_grads)
      gradients(head, labels + n, ignore_index, tokens, share, dhidden + n * head.R, dweight, first && n == 0, b);
  }
  return loss;
}

}  // namespace

void HeadWeight::fill(int threads) const {
  if (!narrow()) return;
  parallel_ranges(chunks(), threads, [&](int, int64_t begin, int64_t end) {
    for (int64_t v = begin * NARROW; v < end * NARROW; v += NARROW) {
      const int64_t count = least(V - v, NARROW);
      if (terms != nullptr) packed_a(count, R, words(v), terms + v * terms_of<BuildTerm>(R));
      if (packed != nullptr) pack_b(R, count, words(v), packed + v / NARROW * packed_size<BuildTerm>(R, NARROW));
    }
  });
}

double linear_cross_entropy_rows(const float* hidden, int64_t hidden_row, const HeadWeight& head, const int64_t* labels,
                                 int64_t ignore_index, float share, float* dhidden, float* dweight, bool first,
                                 int64_t N) {
  const auto by_blocks = head.narrow() ? rows_by_blocks<OF_NARROW> : rows_by_blocks<OF_WIDE>;
  return by_blocks(hidden, hidden_row, head, labels, ignore_index, share, dhidden, dweight, first, N);
}

int64_t linear_cross_entropy(const float* hidden, int64_t hidden_row, const float* weight, const int64_t* labels,
                             int64_t ignore_index, float* loss, float* dhidden, float* dweight, int64_t N, int64_t R,
                             int64_t V, bool with_grads, int threads) {
  int64_t bad = 0, counted = 0;
  for (int64_t n = 0; n < N; ++n) {
    bad += labels[n] != ignore_index && (labels[n] < 0 || labels[n] >= V);
    counted += labels[n] != ignore_index;
  }
  if (bad != 0) return bad;
  const float share = counted > 0 ? 1.0f / float(counted) : 0.0f;
  const auto head = carved(dsfast::WEIGHTS, [&](Carver& c) { return HeadWeight(weight, V, R, with_grads, c); });
  head.fill(threads);
  double losses[MAX_THREADS] = {};
  Partials partials;
  // Whole blocks for each thread, so that the parts do not depend on how a range begins.
  const int64_t block = head.narrow() ? OF_NARROW : OF_WIDE;
  parallel_ranges((N + block - 1) / block, threads, [&](int thread, int64_t begin, int64_t end) {
    const int64_t n = begin * block, tokens = least(N, end * block) - n;
    if (tokens <= 0) return;
    float* dw = with_grads ? partials.of[thread] = dsfast::scratch(V * R, dsfast::GRADIENTS) : nullptr;
    losses[thread] = linear_cross_entropy_rows(hidden + n * hidden_row, hidden_row, head, labels + n, ignore_index,
                                               share, with_grads ? dhidden + n * R : nullptr, dw, true, tokens);
  });
  if (with_grads) partials.add_up(dweight, V * R, threads);
  double total = 0;
  for (double part : losses) total += part;
  *loss = counted > 0 ? float(total / double(counted)) : 0.0f;
  return 0;
}

}  // namespace DSFAST_ISA
