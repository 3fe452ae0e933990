// Causal attention by documents, QUERIES at a time; see dsfast/ops/mla_attention.py.
//
// One task is one head of one document. Its keys and values are packed once; scores of a block of queries are kept
// transposed, [keys][lanes]: the queries lie in the lanes, so that the softmax needs no work across lanes and no
// product a transposition.
#include <cmath>

#include "kernels.h"
#include "parallel.h"
#include "pieces.h"
#include "softmax.h"

namespace DSFAST_ISA {
namespace {

constexpr int64_t QUERIES = 48;  // whole vectors as columns and whole blocks of MR as rows in every instruction set
constexpr int64_t STEP = 16;     // queries that are taken to see the same keys; what they do not is masked
static_assert(QUERIES % W == 0 && QUERIES % MR == 0 && STEP % W == 0, "a block must fill the lanes and rows of a tile");

// A block of queries: their first position in the document, how many, and the lanes they take.
struct Block {
  int64_t first, rows, lanes;
  Block(int64_t first, int64_t length)
      : first(first), rows(least(length - first, QUERIES)), lanes((rows + W - 1) / W * W) {}
  int64_t keys() const { return first + rows; }

  // f(key, keys, query): what the queries from `query` on see; below the diagonal all at once, then a step at a time.
  template <class F>
  DSFAST_INLINE void for_seen(F f) const {
    f(int64_t(0), first + least(rows, STEP), int64_t(0));
    for (int64_t i = STEP; i < rows; i += STEP) f(first + i, least(rows - i, STEP), i);
  }

  // Writes `value` where the key comes after the query.
  DSFAST_INLINE void mask(float* scores, float value) const {
    for (int64_t j = 1; j < rows; ++j)
      for (int64_t i = 0; i < j; ++i) scores[(first + j) * lanes + i] = value;
  }
};

bool rises(const int32_t* cu_seqlens, int64_t S, int64_t N) {
  if (S < 0 || cu_seqlens[0] != 0 || cu_seqlens[S] != N) return false;
  for (int64_t s = 0; s < S; ++s)
    if (cu_seqlens[s] > cu_seqlens[s + 1]) return false;
  return true;
}

DSFAST_INLINE void copy_scaled(const float* from, float* to, int64_t count, float scale) {
  for_vectors(count, [&](int64_t i, int64_t n) { store_n(to + i, load_n(from + i, n) * scale, n); });
}

// rows [count][Dn + Dr] of a head: nope and rope part behind each other
void pack_keyed(View nope, View rope, int64_t head, int64_t count, const AttentionSizes& z, float scale, float* out) {
  for (int64_t i = 0; i < count; ++i, out += z.Dk()) {
    copy_scaled(nope.at(i, head), out, z.Dn, scale);
    copy_scaled(rope.at(i, head), out + z.Dn, z.Dr, scale);
  }
}

void pack(View x, int64_t head, int64_t count, int64_t width, float* out) {
  for (int64_t i = 0; i < count; ++i) copy_scaled(x.at(i, head), out + i * width, width, 1.0f);
}

// [rows][width] -> [width][lanes], lanes past the rows zero
void transpose(const float* in, const Block& b, int64_t width, float* out) {
  if (b.rows < b.lanes) clear(out, width * b.lanes);
  for (int64_t i = 0; i < b.rows; ++i)
    for (int64_t d = 0; d < width; ++d) out[d * b.lanes + i] = in[i * width + d];
}

// x [keys, width] times y [width][lanes]
void products(const Block& b, const float* x, int64_t width, const float* y, float* scores) {
  b.for_seen([&](int64_t key, int64_t keys, int64_t query) {
    gemm(keys, b.lanes - query, width, {x + key * width, width, 1}, {y + query, b.lanes, 1},
         scores + key * b.lanes + query, b.lanes);
  });
}

// out [rows][width] = scores^T x, x [keys, width]
void weighted(const Block& b, const float* scores, const float* x, int64_t width, float* out, int64_t out_row) {
  b.for_seen([&](int64_t key, int64_t keys, int64_t query) {
    gemm(b.rows - query, width, keys, {scores + key * b.lanes + query, 1, b.lanes}, {x + key * width, width, 1},
         out + query * out_row, out_row, query > 0);
  });
}

// sums [keys][width] += scores y, y [rows][width]
void gather_gradient(const Block& b, const float* scores, const float* y, int64_t width, float* sums) {
  b.for_seen([&](int64_t key, int64_t keys, int64_t query) {
    gemm(keys, width, b.rows - query, {scores + key * b.lanes + query, b.lanes, 1}, {y + query * width, width, 1},
         sums + key * width, width, true);
  });
}

// p = exp(score - top) / sum, ds = p (dp - sum p dp) where ds holds dp on entry. Sum and delta are made anew from the
// same numbers as p and dp, so that what must cancel does: a log-sum-exp or a delta from the output would each round by
// itself.
void softmax_backward(const Block& b, const float* tops, float* p, float* ds) {
  for (int64_t part = 0; part < b.lanes; part += W) {
    const vfloat top = load(tops + part);
    vfloat total = {}, delta = {};
    for (int64_t j = 0; j < b.keys(); ++j) {
      const vfloat e = exp(load(p + j * b.lanes + part) - top);
      store(p + j * b.lanes + part, e);
      total += e;
      delta += e * load(ds + j * b.lanes + part);
    }
    const vfloat share = 1.0f / total;
    delta *= share;
    for (int64_t j = 0; j < b.keys(); ++j) {
      const vfloat weight = load(p + j * b.lanes + part) * share;
      store(p + j * b.lanes + part, weight);
      store(ds + j * b.lanes + part, weight * (load(ds + j * b.lanes + part) - delta));
    }
  }
}

// What the backward pass of a head keeps in this thread's working memory.
struct Work {
  float *keys, *values, *dkeys, *dvalues;  // [length][...]
  float *p, *ds;                           // [length][lanes]
  float *q, *q_t, *d_o, *do_t, *dq;        // [QUERIES][...] and [...][lanes]

  Work(int64_t length, const AttentionSizes& z) {
    const int64_t width = z.Dk() + z.Dv;
    float* next = dsfast::scratch(length * 2 * (width + QUERIES) + QUERIES * (3 * z.Dk() + 2 * z.Dv));
    auto carve = [&](int64_t count) { return (next += count) - count; };
    keys = carve(length * z.Dk()), dkeys = carve(length * z.Dk());
    values = carve(length * z.Dv), dvalues = carve(length * z.Dv);
    p = carve(length * QUERIES), ds = carve(length * QUERIES);
    q = carve(QUERIES * z.Dk()), q_t = carve(QUERIES * z.Dk()), dq = carve(QUERIES * z.Dk());
    d_o = carve(QUERIES * z.Dv), do_t = carve(QUERIES * z.Dv);
  }
};

}  // namespace

void attend(const AttentionParts<const float>& in, int64_t length, int64_t head, const AttentionSizes& z, Slots o,
            float* tops) {
  const int64_t Dk = z.Dk();
  float* keys = dsfast::scratch(length * (Dk + z.Dv + QUERIES) + 2 * Dk * QUERIES);
  float *values = keys + length * Dk, *scores = values + length * z.Dv;
  float *q = scores + length * QUERIES, *q_t = q + Dk * QUERIES;
  pack_keyed(in.k_nope, in.k_rope, head, length, z, 1.0f, keys);
  pack(in.v, head, length, z.Dv, values);
  for (int64_t first = 0; first < length; first += QUERIES) {
    const Block b(first, length);
    pack_keyed(in.q_nope.from(first), in.q_rope.from(first), head, b.rows, z, z.scale, q);
    transpose(q, b, Dk, q_t);
    products(b, keys, Dk, q_t, scores);
    b.mask(scores, -INFINITY);
    float top[QUERIES], total[QUERIES];
    exponentials(scores, b.keys(), b.lanes, top, total);
    weighted(b, scores, values, z.Dv, o.at(first, head), o.token);
    for (int64_t i = 0; i < b.rows; ++i) {
      copy_scaled(o.at(first + i, head), o.at(first + i, head), z.Dv, 1.0f / total[i]);
      tops[first + i] = top[i];
    }
  }
}

void attend_backward(const AttentionParts<const float>& in, View d_o, const float* tops, int64_t length, int64_t head,
                     const AttentionSizes& z, const AttentionParts<float>& grads, bool add_k_rope) {
  const int64_t Dk = z.Dk();
  Work w(length, z);
  pack_keyed(in.k_nope, in.k_rope, head, length, z, 1.0f, w.keys);
  pack(in.v, head, length, z.Dv, w.values);
  clear(w.dkeys, length * Dk);
  clear(w.dvalues, length * z.Dv);
  for (int64_t first = 0; first < length; first += QUERIES) {
    const Block b(first, length);
    pack_keyed(in.q_nope.from(first), in.q_rope.from(first), head, b.rows, z, z.scale, w.q);
    transpose(w.q, b, Dk, w.q_t);
    pack(d_o.from(first), head, b.rows, z.Dv, w.d_o);
    transpose(w.d_o, b, z.Dv, w.do_t);
    float top[QUERIES];
    for (int64_t i = 0; i < b.lanes; ++i) top[i] = i < b.rows ? tops[first + i] : 0.0f;
    products(b, w.keys, Dk, w.q_t, w.p);
    products(b, w.values, z.Dv, w.do_t, w.ds);
    b.mask(w.p, -INFINITY);
    b.mask(w.ds, 0.0f);
    softmax_backward(b, top, w.p, w.ds);
    gather_gradient(b, w.p, w.d_o, z.Dv, w.dvalues);
    gather_gradient(b, w.ds, w.q, Dk, w.dkeys);
    weighted(b, w.ds, w.keys, Dk, w.dq, Dk);
    for (int64_t i = 0; i < b.rows; ++i) {
      copy_scaled(w.dq + i * Dk, grads.q_nope.at(first + i, head), z.Dn, z.scale);
      copy_scaled(w.dq + i * Dk + z.Dn, grads.q_rope.at(first + i, head), z.Dr, z.scale);
    }
  }
  for (int64_t j = 0; j < length; ++j) {
    const float* dkey = w.dkeys + j * Dk;
    copy_scaled(dkey, grads.k_nope.at(j, head), z.Dn, 1.0f);
    copy_scaled(w.dvalues + j * z.Dv, grads.v.at(j, head), z.Dv, 1.0f);
    if (add_k_rope)
      add(dkey + z.Dn, grads.k_rope.at(j, head), z.Dr);
    else
      copy_scaled(dkey + z.Dn, grads.k_rope.at(j, head), z.Dr, 1.0f);
  }
}

bool mla_attention_forward(const float* q_nope, int64_t qn_token, int64_t qn_head, const float* q_rope,
                           int64_t qr_token, int64_t qr_head, const float* k_nope, int64_t kn_token, int64_t kn_head,
                           const float* k_rope, int64_t kr_token, const float* v, int64_t v_token, int64_t v_head,
                           const int32_t* cu_seqlens, float scale, float* o, float* tops, int64_t N, int64_t H,
                           int64_t Dn, int64_t Dr, int64_t Dv, int64_t S, int threads) {
  if (!rises(cu_seqlens, S, N)) return false;
  const AttentionParts<const float> in = {{q_nope, qn_token, qn_head},
                                          {q_rope, qr_token, qr_head},
                                          {k_nope, kn_token, kn_head},
                                          {k_rope, kr_token, 0},
                                          {v, v_token, v_head}};
  const AttentionSizes z = {Dn, Dr, Dv, scale};
  parallel_tasks(S * H, threads, [&](int64_t task) {
    const int64_t first = cu_seqlens[task / H], length = cu_seqlens[task / H + 1] - first, head = task % H;
    if (length > 0) attend(in.from(first), length, head, z, {o + first * H * Dv, H * Dv, Dv}, tops + head * N + first);
  });
  return true;
}

void mla_attention_backward(const float* d_o, int64_t do_token, int64_t do_head, const float* q_nope, int64_t qn_token,
                            int64_t qn_head, const float* q_rope, int64_t qr_token, int64_t qr_head,
                            const float* k_nope, int64_t kn_token, int64_t kn_head, const float* k_rope,
                            int64_t kr_token, const float* v, int64_t v_token, int64_t v_head,
                            const int32_t* cu_seqlens, float scale, const float* tops, float* dq_nope, float* dq_rope,
                            float* dk_nope, float* dk_rope, float* dv, int64_t N, int64_t H, int64_t Dn, int64_t Dr,
                            int64_t Dv, int64_t S, int threads) {
  const AttentionParts<const float> in = {{q_nope, qn_token, qn_head},
                                          {q_rope, qr_token, qr_head},
                                          {k_nope, kn_token, kn_head},
                                          {k_rope, kr_token, 0},
                                          {v, v_token, v_head}};
  const AttentionParts<float> grads = {
      {dq_nope, H * Dn, Dn}, {dq_rope, H * Dr, Dr}, {dk_nope, H * Dn, Dn}, {dk_rope, Dr, N * Dr}, {dv, H * Dv, Dv}};
  const View grad = {d_o, do_token, do_head};
  const AttentionSizes z = {Dn, Dr, Dv, scale};
  parallel_tasks(S * H, threads, [&](int64_t task) {
    const int64_t first = cu_seqlens[task / H], length = cu_seqlens[task / H + 1] - first, head = task % H;
    if (length > 0)
      attend_backward(in.from(first), grad.from(first), tops + head * N + first, length, head, z, grads.from(first),
                      false);
  });
}

}  // namespace DSFAST_ISA
