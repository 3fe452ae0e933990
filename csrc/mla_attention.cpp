// Causal attention by documents, QUERIES at a time; see dsfast/ops/mla_attention.py.
//
// One task is one head of one document. Its keys and values are packed once; scores of a block of queries are kept
// transposed, [keys][lanes]: the queries lie in the lanes, so that the softmax needs no work across lanes and no
// product a transposition. What goes into several products is made into their terms once.
#include <cmath>

#include "carver.h"
#include "kernels.h"
#include "parallel.h"
#include "pieces.h"

namespace DSFAST_ISA {
namespace {

constexpr int64_t QUERIES = 48;  // whole vectors as columns and whole blocks of MR as rows in every instruction set
constexpr int64_t STEP = NR > 16 ? NR : 16;  // queries that are taken to see the same keys; what they do not is masked
static_assert(QUERIES % W == 0 && QUERIES % MR == 0 && STEP % NR == 0,
              "a block must fill the lanes and rows of a tile");

using Term = BuildTerm;
using Factor = Terms<Term>;
constexpr int64_t PER = PER_TERM<Term>;

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
      for_vectors(j, [&](int64_t i, int64_t n) { store_n(scores + (first + j) * lanes + i, splat(value), n); });
  }
};

// What belongs to a key and a query, [keys][lanes], as first factors: terms along the keys, and along the queries.
struct Weighed {
  Term *down, *along;  // [keys / PER][lanes] and [keys][lanes / PER]; floats lie in one place
  Factor by_keys(const Block& b) const { return {down, 1, b.lanes}; }
  Factor by_queries(const Block& b) const { return {along, b.lanes / PER, 1}; }
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
  for (int64_t i = 0; i < count; ++i) copy(x.at(i, head), out + i * width, width);
}

// The block's rows [rows][width] turned, [width][lanes]; lanes past the rows are zero
PackedB pack_lanes(const Block& b, const float* rows, int64_t width, Term* memory) {
  PackedB packed = pack_b(b.rows, width, {rows, 1, width}, memory);
  packed.N = b.lanes;
  return packed;
}

// x [keys, width] times y [width][lanes]
void products(const Block& b, Factor x, const PackedB& y, float* scores) {
  b.for_seen([&](int64_t key, int64_t keys, int64_t query) {
    gemm(keys, x.rows_from(key), y.columns_from(query), scores + key * b.lanes + query, b.lanes);
  });
}

// out [rows][width] = scores^T x, x [keys, width]
void weighted(const Block& b, const Weighed& scores, const PackedB& x, float* out, int64_t out_row) {
  b.for_seen([&](int64_t key, int64_t keys, int64_t query) {
    gemm(b.rows - query, scores.by_keys(b).rows_from(query).columns_from(key / PER), x.rows(key, keys),
         out + query * out_row, out_row, query > 0);
  });
}

// sums [keys][width] += scores y, y [rows][width]
void gather_gradient(const Block& b, const Weighed& scores, const PackedB& y, float* sums) {
  b.for_seen([&](int64_t key, int64_t keys, int64_t query) {
    gemm(keys, scores.by_queries(b).rows_from(key).columns_from(query / PER), y.rows(query, b.rows - query),
         sums + key * y.N, y.N, true);
  });
}

// exp(score - top) as terms down the keys, [terms of keys][lanes]; floats may take the scores' place. top and total
// [lanes], the maximum and the sum of each query. lanes: of W.
void exponentials(const float* scores, int64_t keys, int64_t lanes, Term* exps, float* top, float* total) {
  for (int64_t part = 0; part < lanes; part += W) {
    vfloat high = splat(-INFINITY), added = {};
    for (int64_t j = 0; j < keys; ++j) high = maximum(high, load(scores + j * lanes + part));
    for (int64_t j = 0; j < keys; j += PER) {
      vfloat e[PER] = {};
      for (int64_t p = 0; p < PER && j + p < keys; ++p)
        added += e[p] = exp_of_difference(load(scores + (j + p) * lanes + part), high);
      store_terms(e, nullptr, 0, exps + j / PER * lanes + part);
    }
    store(top + part, high);
    store(total + part, added);
  }
}

// p = exp(score - top) / sum, ds = p (dp - sum p dp); on entry p holds the scores. Sum and delta are made anew from the
// same numbers as p and dp, so that what must cancel does: a log-sum-exp or a delta from the output would each round by
// itself.
void softmax_backward(const Block& b, const float* tops, float* p, const float* dp, Term* weights, const Weighed& ds) {
  for (int64_t part = 0; part < b.lanes; part += W) {
    const vfloat top = load(tops + part);
    vfloat total = {}, delta = {};
    for (int64_t j = 0; j < b.keys(); ++j) {
      const vfloat e = exp_of_difference(load(p + j * b.lanes + part), top);
      store(p + j * b.lanes + part, e);
      total += e;
      delta += e * load(dp + j * b.lanes + part);
    }
    const vfloat share = 1.0f / total;
    delta *= share;
    for (int64_t j = 0; j < b.keys(); j += PER) {
      vfloat weight[PER] = {}, grad[PER] = {};
      for (int64_t i = 0; i < PER && j + i < b.keys(); ++i) {
        weight[i] = load(p + (j + i) * b.lanes + part) * share;
        grad[i] = weight[i] * (load(dp + (j + i) * b.lanes + part) - delta);
      }
      const int64_t along = (j * b.lanes + part) / PER, down = j / PER * b.lanes + part;
      store_terms(weight, weights + along, b.lanes / PER, nullptr);
      store_terms(grad, ds.along + along, b.lanes / PER, ds.down + down);
    }
  }
}

// A head's working memory, of this thread: for the document, and for a block of queries.
struct Work {
  float *keys, *values, *dkeys, *dvalues;  // [length][...]
  float *scores, *dscores;                 // [length][lanes]
  Weighed p, ds;
  float *q, *d_o, *dq;  // [QUERIES][...]
  Term *key_terms, *value_terms, *packed_keys, *packed_values, *packed_q, *packed_do, *turned_q, *turned_do;

  Work(Carver& c, int64_t length, int64_t Dk, int64_t Dv) {
    keys = c.floats(length * Dk), dkeys = c.floats(length * Dk);
    values = c.floats(length * Dv), dvalues = c.floats(length * Dv);
    scores = c.floats(length * QUERIES), dscores = c.floats(length * QUERIES);
    p = weighed(c, length, scores), ds = weighed(c, length, dscores);
    q = c.floats(QUERIES * Dk), d_o = c.floats(QUERIES * Dv), dq = c.floats(QUERIES * Dk);
    key_terms = c.of<Term>(packed_a_size(length, Dk)), value_terms = c.of<Term>(packed_a_size(length, Dv));
    packed_keys = c.of<Term>(packed_size<Term>(Dk, length)), packed_values = c.of<Term>(packed_size<Term>(Dv, length));
    packed_q = c.of<Term>(packed_size<Term>(Dk, QUERIES)), packed_do = c.of<Term>(packed_size<Term>(Dv, QUERIES));
    turned_q = c.of<Term>(packed_size<Term>(QUERIES, Dk)), turned_do = c.of<Term>(packed_size<Term>(QUERIES, Dv));
  }

 private:
  static Weighed weighed(Carver& c, int64_t length, float* numbers) {
    Term* place = reinterpret_cast<Term*>(numbers);
    if (PER == 1) return {place, place};
    const int64_t terms = terms_of<Term>(length) * QUERIES;
    return {c.of<Term>(terms), c.of<Term>(terms)};
  }
};

}  // namespace

void attend(const AttentionParts<const float>& in, int64_t length, int64_t head, const AttentionSizes& z, Slots o,
            float* tops) {
  const int64_t Dk = z.Dk();
  const auto w = carved(dsfast::OF_PIECES, [&](Carver& c) { return Work(c, length, Dk, z.Dv); });
  pack_keyed(in.k_nope, in.k_rope, head, length, z, 1.0f, w.keys);
  pack(in.v, head, length, z.Dv, w.values);
  const Factor keys = packed_a(length, Dk, {w.keys, Dk, 1}, w.key_terms);
  const PackedB values = pack_b(z.Dv, length, {w.values, z.Dv, 1}, w.packed_values);
  for (int64_t first = 0; first < length; first += QUERIES) {
    const Block b(first, length);
    pack_keyed(in.q_nope.from(first), in.q_rope.from(first), head, b.rows, z, z.scale, w.q);
    products(b, keys, pack_lanes(b, w.q, Dk, w.turned_q), w.scores);
    b.mask(w.scores, -INFINITY);
    float top[QUERIES], total[QUERIES];
    exponentials(w.scores, b.keys(), b.lanes, w.p.down, top, total);
    weighted(b, w.p, values, o.at(first, head), o.token);
    for (int64_t i = 0; i < b.rows; ++i) {
      copy_scaled(o.at(first + i, head), o.at(first + i, head), z.Dv, 1.0f / total[i]);
      tops[first + i] = top[i];
    }
  }
}

void attend_backward(const AttentionParts<const float>& in, View d_o, const float* tops, int64_t length, int64_t head,
                     const AttentionSizes& z, const AttentionParts<float>& grads, bool add_k_rope) {
  const int64_t Dk = z.Dk(), Dv = z.Dv;
  const auto w = carved(dsfast::OF_PIECES, [&](Carver& c) { return Work(c, length, Dk, z.Dv); });
  pack_keyed(in.k_nope, in.k_rope, head, length, z, 1.0f, w.keys);
  pack(in.v, head, length, Dv, w.values);
  const Factor keys = packed_a(length, Dk, {w.keys, Dk, 1}, w.key_terms);
  const Factor values = packed_a(length, Dv, {w.values, Dv, 1}, w.value_terms);
  const PackedB packed_keys = pack_b(Dk, length, {w.keys, Dk, 1}, w.packed_keys);
  clear(w.dkeys, length * Dk);
  clear(w.dvalues, length * Dv);
  for (int64_t first = 0; first < length; first += QUERIES) {
    const Block b(first, length);
    pack_keyed(in.q_nope.from(first), in.q_rope.from(first), head, b.rows, z, z.scale, w.q);
    pack(d_o.from(first), head, b.rows, Dv, w.d_o);
    float top[QUERIES];
    for (int64_t i = 0; i < b.lanes; ++i) top[i] = i < b.rows ? tops[first + i] : 0.0f;
    products(b, keys, pack_lanes(b, w.q, Dk, w.turned_q), w.scores);
    products(b, values, pack_lanes(b, w.d_o, Dv, w.turned_do), w.dscores);
    b.mask(w.scores, -INFINITY);
    b.mask(w.dscores, 0.0f);
    softmax_backward(b, top, w.scores, w.dscores, w.p.along, w.ds);
    gather_gradient(b, w.p, pack_b(Dv, b.rows, {w.d_o, Dv, 1}, w.packed_do), w.dvalues);
    gather_gradient(b, w.ds, pack_b(Dk, b.rows, {w.q, Dk, 1}, w.packed_q), w.dkeys);
    weighted(b, w.ds, packed_keys, w.dq, Dk);
    for (int64_t i = 0; i < b.rows; ++i) {
      copy_scaled(w.dq + i * Dk, grads.q_nope.at(first + i, head), z.Dn, z.scale);
      copy_scaled(w.dq + i * Dk + z.Dn, grads.q_rope.at(first + i, head), z.Dr, z.scale);
    }
  }
  for (int64_t j = 0; j < length; ++j) {
    const float* dkey = w.dkeys + j * Dk;
    copy(dkey, grads.k_nope.at(j, head), z.Dn);
    copy(w.dvalues + j * Dv, grads.v.at(j, head), Dv);
    if (add_k_rope)
      add(dkey + z.Dn, grads.k_rope.at(j, head), z.Dr);
    else
      copy(dkey + z.Dn, grads.k_rope.at(j, head), z.Dr);
  }
}

namespace {

// What a head of queries sees, where `shared` of them have one head of keys and values.
AttentionParts<const float> seen_by(AttentionParts<const float> in, int64_t head, int64_t shared) {
  in.k_nope = {in.k_nope.at(0, head / shared), in.k_nope.token, 0};
  in.v = {in.v.at(0, head / shared), in.v.token, 0};
  return in;
}

}  // namespace

bool mla_attention_forward(const float* q_nope, int64_t qn_token, int64_t qn_head, const float* q_rope,
                           int64_t qr_token, int64_t qr_head, const float* k_nope, int64_t kn_token, int64_t kn_head,
                           const float* k_rope, int64_t kr_token, const float* v, int64_t v_token, int64_t v_head,
                           const int32_t* cu_seqlens, float scale, float* o, float* tops, int64_t N, int64_t H,
                           int64_t shared, int64_t Dn, int64_t Dr, int64_t Dv, int64_t S, int threads) {
  if (!rises(cu_seqlens, S, N)) return false;
  const AttentionParts<const float> in = {{q_nope, qn_token, qn_head},
                                          {q_rope, qr_token, qr_head},
                                          {k_nope, kn_token, kn_head},
                                          {k_rope, kr_token, 0},
                                          {v, v_token, v_head}};
  const AttentionSizes z = {Dn, Dr, Dv, scale};
  parallel_tasks(S * H, threads, [&](int64_t task) {
    const int64_t first = cu_seqlens[task / H], length = cu_seqlens[task / H + 1] - first, head = task % H;
    if (length > 0)
      attend(seen_by(in.from(first), head, shared), length, head, z, {o + first * H * Dv, H * Dv, Dv},
             tops + head * N + first);
  });
  return true;
}

void mla_attention_backward(const float* d_o, int64_t do_token, int64_t do_head, const float* q_nope, int64_t qn_token,
                            int64_t qn_head, const float* q_rope, int64_t qr_token, int64_t qr_head,
                            const float* k_nope, int64_t kn_token, int64_t kn_head, const float* k_rope,
                            int64_t kr_token, const float* v, int64_t v_token, int64_t v_head,
                            const int32_t* cu_seqlens, float scale, const float* tops, float* dq_nope, float* dq_rope,
                            float* dk_nope, float* dk_rope, float* dv, int64_t N, int64_t H, int64_t shared, int64_t Dn,
                            int64_t Dr, int64_t Dv, int64_t S, int threads) {
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
      attend_backward(seen_by(in.from(first), head, shared), grad.from(first), tops + head * N + first, length, head, z,
                      grads.from(first), false);
  });
}

}  // namespace DSFAST_ISA
