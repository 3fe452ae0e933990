// The head's loss and gradients from blocks of logits; see dsfast/ops/linear_cross_entropy.py.
//
// A block of tokens meets the vocabulary chunk by chunk. Logits are kept transposed, [words][TOKENS]: the tokens lie in
// the lanes, so that maximum, exp and sum need no work across lanes and all three products (logits, dhidden, dweight)
// read every operand as it lies in memory. While a chunk is in the first-level cache its logits become exponentials and
// give their part of dhidden; kept for the whole vocabulary, they give dweight once their sum is known.
#include <cmath>

#include "gemm.h"
#include "kernels.h"
#include "parallel.h"
#include "pieces.h"

namespace DSFAST_ISA {
namespace {

constexpr int64_t TOKENS = 4 * NR;  // at a time: the more, the less often the weights and their gradient are read
constexpr int64_t CHUNK = 48;  // words at a time: logits, weights, hidden and its gradient fit the first-level cache
// A sum of exponentials above this says that a logit lies some 40 above the reference that is subtracted before exp:
// far from overflow, also summed over the words.
constexpr float FAR = 2e17f;

struct Head {
  const float* weight;
  int64_t R, V;
};

struct Block {
  float* exps;    // [V][TOKENS], exp(logit - reference); without gradients one chunk's, [CHUNK][TOKENS]
  float* hidden;  // [R][TOKENS], transposed
  float* scaled;  // [TOKENS][R], hidden times the token's gradient scale
  float* grad;    // [TOKENS][R], sum of exps times weight
  float reference[TOKENS], total[TOKENS];
};

void load_hidden(const Head& head, const float* hidden, int64_t row, int64_t tokens, Block& b) {
  for (int64_t r = 0; r < head.R; ++r)
    for (int64_t i = 0; i < TOKENS; ++i) b.hidden[r * TOKENS + i] = i < tokens ? hidden[i * row + r] : 0.0f;
}

// The first chunk's largest logits become the reference, and what is to be summed starts at nothing.
void set_reference(const float* chunk, int64_t words, Block& b) {
  for (int64_t t = 0; t < TOKENS; t += W) {
    vfloat top = splat(-INFINITY);
    for (int64_t i = 0; i < words; ++i) top = maximum(top, load(chunk + i * TOKENS + t));
    store(b.reference + t, top);
    store(b.total + t, vfloat{});
  }
}

// Raises the reference to this chunk's largest logits where they lie above it, and with it all that was made so far.
void raise_reference(const Head& head, const float* chunk, int64_t words, int64_t before, bool with_grads, Block& b) {
  for (int64_t t = 0; t < TOKENS; t += W) {
    vfloat top = load(b.reference + t);
    const vfloat old = top;
    for (int64_t i = 0; i < words; ++i) top = maximum(top, load(chunk + i * TOKENS + t));
    const vfloat factor = exp(old - top);
    store(b.reference + t, top);
    store(b.total + t, load(b.total + t) * factor);
    if (!with_grads) continue;
    for (int64_t v = 0; v < before; ++v) store(b.exps + v * TOKENS + t, load(b.exps + v * TOKENS + t) * factor);
    for (int64_t i = 0; i < W; ++i)
      for (int64_t r = 0; r < head.R; ++r) b.grad[(t + i) * head.R + r] *= factor[i];
  }
}

// Logits of a chunk -> their exponentials, in place, summed by chunk first: fewer roundings than one long sum. False,
// and nothing added to the totals, where the sum says that a logit lies far above the reference.
bool exponentials(float* chunk, int64_t words, Block& b) {
  vfloat parts[TOKENS / W];
  vint far = {};
  for (int64_t t = 0; t < TOKENS; t += W) {
    const vfloat reference = load(b.reference + t);
    vfloat part = {};
    for (int64_t i = 0; i < words; ++i) {
      const vfloat e = exp(load(chunk + i * TOKENS + t) - reference);
      store(chunk + i * TOKENS + t, e);
      part += e;
    }
    parts[t / W] = part;
    far |= part > FAR;
  }
  if (any(far)) return false;
  for (int64_t t = 0; t < TOKENS; t += W) store(b.total + t, load(b.total + t) + parts[t / W]);
  return true;
}

// All words: exps, their total and, if wanted, grad.
void meet_vocabulary(const Head& head, bool with_grads, Block& b) {
  for (int64_t v = 0; v < head.V; v += CHUNK) {
    const int64_t words = least(head.V - v, CHUNK);
    float* chunk = with_grads ? b.exps + v * TOKENS : b.exps;
    const float* weight = head.weight + v * head.R;
    const auto logits = [&] { gemm(words, TOKENS, head.R, {weight, head.R, 1}, {b.hidden, TOKENS, 1}, chunk, TOKENS); };
    logits();
    if (v == 0) set_reference(chunk, words, b);
    if (!exponentials(chunk, words, b)) {  // rare: the reference of the first chunk is seldom far from the maximum
      logits();
      raise_reference(head, chunk, words, v, with_grads, b);
      exponentials(chunk, words, b);
    }
    if (with_grads) gemm(TOKENS, head.R, words, {chunk, 1, TOKENS}, {weight, head.R, 1}, b.grad, head.R, v > 0);
  }
}

// A token's logit of its label, summed in the same order as in `meet_vocabulary`: the same bits.
float label_logit(const Head& head, const Block& b, int64_t token, int64_t label) {
  float logit;
  gemm(1, 1, head.R, {head.weight + label * head.R, head.R, 1}, {b.hidden + token, TOKENS, 1}, &logit, 1);
  return logit;
}

// With p = exp / total, share = 1 / (tokens that count): dhidden = share (p weight - weight[label]) and dweight
// += share (p^T hidden - hidden[label]).
void gradients(const Head& head, const int64_t* labels, int64_t ignore_index, int64_t tokens, float share,
               float* dhidden, float* dweight, bool first, Block& b) {
  const int64_t R = head.R;
  for (int64_t i = 0; i < TOKENS; ++i) {
    const bool counts = i < tokens && labels[i] != ignore_index;
    const float scale = counts ? share / b.total[i] : 0.0f;
    for (int64_t r = 0; r < R; ++r) b.scaled[i * R + r] = b.hidden[r * TOKENS + i] * scale;
    if (i >= tokens) continue;
    const float* of_label = head.weight + (counts ? labels[i] * R : 0);
    for (int64_t r = 0; r < R; ++r)
      dhidden[i * R + r] = counts ? b.grad[i * R + r] * scale - of_label[r] * share : 0.0f;
  }
  for (int64_t v = 0; v < head.V; v += CHUNK)
    gemm(least(head.V - v, CHUNK), R, TOKENS, {b.exps + v * TOKENS, TOKENS, 1}, {b.scaled, R, 1}, dweight + v * R, R,
         !first);
  for (int64_t i = 0; i < tokens; ++i)
    if (labels[i] != ignore_index)
      for (int64_t r = 0; r < R; ++r) dweight[labels[i] * R + r] -= b.hidden[r * TOKENS + i] * share;
}

}  // namespace

double linear_cross_entropy_rows(const float* hidden, int64_t hidden_row, const float* weight, const int64_t* labels,
                                 int64_t ignore_index, float share, float* dhidden, float* dweight, bool first,
                                 int64_t N, int64_t R, int64_t V) {
  const Head head = {weight, R, V};
  const bool with_grads = dhidden != nullptr;
  const int64_t exps = (with_grads ? V : CHUNK) * TOKENS, block = R * TOKENS;
  float *memory = dsfast::scratch(exps + 3 * block), *transposed = memory + exps;
  Block b = {memory, transposed, transposed + block, transposed + 2 * block, {}, {}};
  double loss = 0;
  for (int64_t n = 0; n < N; n += TOKENS) {
    const int64_t tokens = least(N - n, TOKENS);
    load_hidden(head, hidden + n * hidden_row, hidden_row, tokens, b);
    meet_vocabulary(head, with_grads, b);
    for (int64_t i = 0; i < tokens; ++i)
      if (labels[n + i] != ignore_index)
        loss += double(b.reference[i] - label_logit(head, b, i, labels[n + i])) + std::log(double(b.total[i]));
    if (with_grads)
      gradients(head, labels + n, ignore_index, tokens, share, dhidden + n * R, dweight, first && n == 0, b);
  }
  return loss;
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
  double losses[MAX_THREADS] = {};
  Partials partials;
  // Whole blocks for each thread, so that the parts do not depend on how a range begins.
  parallel_ranges((N + TOKENS - 1) / TOKENS, threads, [&](int thread, int64_t begin, int64_t end) {
    const int64_t n = begin * TOKENS, tokens = least(N, end * TOKENS) - n;
    if (tokens <= 0) return;
    float* dw = with_grads ? partials.of[thread] = dsfast::scratch(V * R, dsfast::GRADIENTS) : nullptr;
    losses[thread] = linear_cross_entropy_rows(hidden + n * hidden_row, hidden_row, weight, labels + n, ignore_index,
                                               share, with_grads ? dhidden + n * R : nullptr, dw, true, tokens, R, V);
  });
  if (with_grads) partials.add_up(dweight, V * R, threads);
  double total = 0;
  for (double part : losses) total += part;
  *loss = counted > 0 ? float(total / double(counted)) : 0.0f;
  return 0;
}

}  // namespace DSFAST_ISA
