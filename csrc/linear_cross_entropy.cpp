// The head's loss and gradients from strips of logits, NR tokens at a time; see dsfast/ops/linear_cross_entropy.py.
//
// A strip is kept transposed, [V][NR]: the tokens lie in the lanes, so that maximum, exp and sum need no work across
// lanes and all three products (logits, dhidden, dweight) read every operand as it lies in memory.
#include <cmath>

#include "gemm.h"
#include "kernels.h"
#include "parallel.h"

namespace DSFAST_ISA {
namespace {

constexpr int64_t CHUNK = 8 * MR;  // words at a time: chunk, weights and gradients together fit the first-level cache

struct Head {
  const float* weight;
  int64_t R, V;
  int64_t end(int64_t v) const { return least(v + CHUNK, V); }
};

struct Strip {
  float* logits;  // [V][NR], then exp(logits - maximum)
  float* hidden;  // [R][NR], transposed
  float* scaled;  // [NR][R], hidden times the row's gradient scale
  float* grad;    // [NR][R]
  float top[NR], total[NR];
};

void load_hidden(const Head& head, const float* hidden, int64_t row, int64_t rows, Strip& s) {
  for (int64_t r = 0; r < head.R; ++r)
    for (int64_t i = 0; i < NR; ++i) s.hidden[r * NR + i] = i < rows ? hidden[i * row + r] : 0.0f;
}

// logits and their maximum over the words
void logits(const Head& head, Strip& s) {
  vfloat top0 = splat(-INFINITY), top1 = top0;
  for (int64_t v = 0; v < head.V; v += CHUNK) {
    float* chunk = s.logits + v * NR;
    gemm(head.end(v) - v, NR, head.R, {head.weight + v * head.R, head.R, 1}, s.hidden, NR, chunk, NR);
    for (int64_t i = 0; i < head.end(v) - v; ++i) {
      top0 = maximum(top0, load(chunk + i * NR));
      top1 = maximum(top1, load(chunk + i * NR + W));
    }
  }
  store(s.top, top0);
  store(s.top + W, top1);
}

void exponentials(const Head& head, Strip& s) {
  const vfloat top0 = load(s.top), top1 = load(s.top + W);
  vfloat total0 = {}, total1 = {};
  for (int64_t v = 0; v < head.V; v += CHUNK) {
    vfloat part0 = {}, part1 = {};  // summed by chunk first: fewer roundings than one long sum
    for (int64_t i = v; i < head.end(v); ++i) {
      float* at = s.logits + i * NR;
      const vfloat e0 = exp(load(at) - top0), e1 = exp(load(at + W) - top1);
      store(at, e0);
      store(at + W, e1);
      part0 += e0;
      part1 += e1;
    }
    total0 += part0;
    total1 += part1;
  }
  store(s.total, total0);
  store(s.total + W, total1);
}

// dweight += p^T hidden and grad = p weight, with p = exp / total / M; the labels' -1 is taken off by the caller.
void gradients(const Head& head, float* dweight, bool first, Strip& s) {
  for (int64_t v = 0; v < head.V; v += CHUNK) {
    const float* chunk = s.logits + v * NR;
    const int64_t words = head.end(v) - v;
    gemm(words, head.R, NR, {chunk, NR, 1}, s.scaled, head.R, dweight + v * head.R, head.R, !first);
    gemm(NR, head.R, words, {chunk, 1, NR}, head.weight + v * head.R, head.R, s.grad, head.R, v > 0);
  }
}

}  // namespace

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
  const Head head = {weight, R, V};
  double losses[MAX_THREADS] = {};
  Partials partials;
  parallel_ranges((N + NR - 1) / NR, threads, [&](int thread, int64_t begin, int64_t end) {
    float* memory = dsfast::scratch(V * NR + 3 * R * NR + (with_grads ? V * R : 0));
    Strip s = {memory, memory + V * NR, memory + (V + R) * NR, memory + (V + 2 * R) * NR, {}, {}};
    float* dw = memory + (V + 3 * R) * NR;
    if (with_grads && begin < end) partials.of[thread] = dw;
    for (int64_t block = begin; block < end; ++block) {
      const int64_t n0 = block * NR, rows = least(N - n0, NR);
      load_hidden(head, hidden + n0 * hidden_row, hidden_row, rows, s);
      logits(head, s);
      float of_label[NR] = {};
      for (int64_t i = 0; i < rows; ++i)
        if (labels[n0 + i] != ignore_index) of_label[i] = s.logits[labels[n0 + i] * NR + i];
      exponentials(head, s);
      for (int64_t i = 0; i < rows; ++i)
        if (labels[n0 + i] != ignore_index)
          losses[thread] += double(s.top[i] - of_label[i]) + std::log(double(s.total[i]));
      if (!with_grads) continue;
      float scale[NR] = {};
      for (int64_t i = 0; i < rows; ++i) scale[i] = labels[n0 + i] != ignore_index ? share / s.total[i] : 0.0f;
      for (int64_t i = 0; i < NR; ++i)
        for (int64_t r = 0; r < R; ++r) s.scaled[i * R + r] = s.hidden[r * NR + i] * scale[i];
      gradients(head, dw, block == begin, s);
      for (int64_t i = 0; i < rows; ++i) {
        const bool counts = labels[n0 + i] != ignore_index;
        for (int64_t r = 0; r < R; ++r) {
          const int64_t at = counts ? labels[n0 + i] * R + r : r;
          dhidden[(n0 + i) * R + r] = counts ? s.grad[i * R + r] * scale[i] - weight[at] * share : 0.0f;
          if (counts) dw[at] -= s.hidden[r * NR + i] * share;
        }
      }
    }
  });
  if (with_grads) partials.add_up(dweight, V * R, threads);
  double total = 0;
  for (double part : losses) total += part;
  *loss = counted > 0 ? float(total / double(counted)) : 0.0f;
  return 0;
}

}  // namespace DSFAST_ISA
