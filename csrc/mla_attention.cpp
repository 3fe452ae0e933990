// Causal attention by documents, NR queries at a time; see dsfast/ops/mla_attention.py.
//
// One task is one head of one document. Its keys and values are packed once; scores of NR queries are kept transposed,
// [keys][NR]: the queries lie in the lanes, so that the softmax needs no work across lanes and no product a
// transposition.
#include <cmath>

#include "gemm.h"
#include "kernels.h"
#include "parallel.h"

namespace DSFAST_ISA {
namespace {

// A [token, head, width] input by its strides.
struct View {
  const float* data;
  int64_t token, head;
  const float* at(int64_t n, int64_t h) const { return data + n * token + h * head; }
};

struct Sizes {
  int64_t Dn, Dr, Dv, Dk;  // Dk = Dn + Dr
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
void pack_keyed(View nope, View rope, int64_t first, int64_t head, int64_t count, const Sizes& z, float scale,
                float* out) {
  for (int64_t i = 0; i < count; ++i) {
    copy_scaled(nope.at(first + i, head), out + i * z.Dk, z.Dn, scale);
    copy_scaled(rope.at(first + i, head), out + i * z.Dk + z.Dn, z.Dr, scale);
  }
}

void pack(View x, int64_t first, int64_t head, int64_t count, int64_t width, float* out) {
  for (int64_t i = 0; i < count; ++i) copy_scaled(x.at(first + i, head), out + i * width, width, 1.0f);
}

// [count][width] -> [width][NR], lanes past count zero
void transpose(const float* in, int64_t count, int64_t width, float* out) {
  if (count < NR) clear(out, width * NR);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t d = 0; d < width; ++d) out[d * NR + i] = in[i * width + d];
}

// Keys after the query: only the last `NR` keys of a strip can be.
template <class F>
void for_future(int64_t q0, int64_t keys, F f) {
  for (int64_t j = q0; j < keys; ++j)
    for (int64_t i = 0; i < j - q0; ++i) f(j * NR + i);
}

// scores -> exp(score - maximum), in place; maximum and sum of each query
void softmax(float* scores, int64_t q0, int64_t keys, float* top, float* total) {
  for_future(q0, keys, [&](int64_t at) { scores[at] = -INFINITY; });
  for (int part = 0; part < NR; part += W) {
    vfloat high = splat(-INFINITY), added = {};
    for (int64_t j = 0; j < keys; ++j) high = maximum(high, load(scores + j * NR + part));
    for (int64_t j = 0; j < keys; ++j) {
      const vfloat e = exp(load(scores + j * NR + part) - high);
      store(scores + j * NR + part, e);
      added += e;
    }
    store(top + part, high);
    store(total + part, added);
  }
}

void forward_head(View qn, View qr, View kn, View kr, View v, int64_t first, int64_t length, int64_t head, int64_t H,
                  float scale, const Sizes& z, float* o, float* tops) {
  float* keys = dsfast::scratch(length * (z.Dk + z.Dv + NR) + 2 * z.Dk * NR);
  float *values = keys + length * z.Dk, *scores = values + length * z.Dv;
  float *q = scores + length * NR, *q_t = q + z.Dk * NR;
  pack_keyed(kn, kr, first, head, length, z, 1.0f, keys);
  pack(v, first, head, length, z.Dv, values);
  for (int64_t q0 = 0; q0 < length; q0 += NR) {
    const int64_t rows = least(length - q0, NR), seen = q0 + rows;
    pack_keyed(qn, qr, first + q0, head, rows, z, scale, q);
    transpose(q, rows, z.Dk, q_t);
    gemm(seen, NR, z.Dk, {keys, z.Dk, 1}, q_t, NR, scores, NR);
    float top[NR], total[NR];
    softmax(scores, q0, seen, top, total);
    float* out = o + ((first + q0) * H + head) * z.Dv;
    gemm(rows, z.Dv, seen, {scores, 1, NR}, values, z.Dv, out, H * z.Dv);
    for (int64_t i = 0; i < rows; ++i) {
      copy_scaled(out + i * H * z.Dv, out + i * H * z.Dv, z.Dv, 1.0f / total[i]);
      tops[first + q0 + i] = top[i];
    }
  }
}

// What the backward pass of a head keeps in this thread's working memory.
struct Work {
  float *keys, *values, *dkeys, *dvalues;  // [length][...]
  float *p, *ds;                           // [length][NR]
  float *q, *q_t, *d_o, *do_t, *dq;        // [NR][...] and [...][NR]
  float top[NR];                           // each query's highest score

  Work(int64_t length, const Sizes& z) {
    const int64_t width = z.Dk + z.Dv;
    float* next = dsfast::scratch(length * 2 * (width + NR) + NR * (3 * z.Dk + 2 * z.Dv));
    auto carve = [&](int64_t count) { return (next += count) - count; };
    keys = carve(length * z.Dk), dkeys = carve(length * z.Dk);
    values = carve(length * z.Dv), dvalues = carve(length * z.Dv);
    p = carve(length * NR), ds = carve(length * NR);
    q = carve(NR * z.Dk), q_t = carve(NR * z.Dk), dq = carve(NR * z.Dk);
    d_o = carve(NR * z.Dv), do_t = carve(NR * z.Dv);
  }
};

// p = exp(score - top) / sum, ds = p (dp - sum p dp) where ds holds dp on entry. Sum and delta are made anew from the
// same numbers as p and dp, so that what must cancel does: a log-sum-exp or a delta from the output would each round by
// itself.
void softmax_backward(Work& w, int64_t q0, int64_t keys) {
  for_future(q0, keys, [&](int64_t at) {
    w.p[at] = -INFINITY;
    w.ds[at] = 0.0f;
  });
  for (int part = 0; part < NR; part += W) {
    const vfloat top = load(w.top + part);
    vfloat total = {}, delta = {};
    for (int64_t j = 0; j < keys; ++j) {
      const vfloat e = exp(load(w.p + j * NR + part) - top);
      store(w.p + j * NR + part, e);
      total += e;
      delta += e * load(w.ds + j * NR + part);
    }
    const vfloat share = 1.0f / total;
    delta *= share;
    for (int64_t j = 0; j < keys; ++j) {
      const vfloat p = load(w.p + j * NR + part) * share;
      store(w.p + j * NR + part, p);
      store(w.ds + j * NR + part, p * (load(w.ds + j * NR + part) - delta));
    }
  }
}

}  // namespace

bool mla_attention_forward(const float* q_nope, int64_t qn_token, int64_t qn_head, const float* q_rope,
                           int64_t qr_token, int64_t qr_head, const float* k_nope, int64_t kn_token, int64_t kn_head,
                           const float* k_rope, int64_t kr_token, const float* v, int64_t v_token, int64_t v_head,
                           const int32_t* cu_seqlens, float scale, float* o, float* tops, int64_t N, int64_t H,
                           int64_t Dn, int64_t Dr, int64_t Dv, int64_t S, int threads) {
  if (!rises(cu_seqlens, S, N)) return false;
  const Sizes z = {Dn, Dr, Dv, Dn + Dr};
  const View qn = {q_nope, qn_token, qn_head}, qr = {q_rope, qr_token, qr_head}, kn = {k_nope, kn_token, kn_head};
  const View kr = {k_rope, kr_token, 0}, values = {v, v_token, v_head};
  parallel_tasks(S * H, threads, [&](int64_t task) {
    const int64_t first = cu_seqlens[task / H], length = cu_seqlens[task / H + 1] - first, head = task % H;
    if (length > 0) forward_head(qn, qr, kn, kr, values, first, length, head, H, scale, z, o, tops + head * N);
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
  const Sizes z = {Dn, Dr, Dv, Dn + Dr};
  const View grad = {d_o, do_token, do_head}, qn = {q_nope, qn_token, qn_head}, qr = {q_rope, qr_token, qr_head};
  const View kn = {k_nope, kn_token, kn_head}, kr = {k_rope, kr_token, 0}, values = {v, v_token, v_head};
  parallel_tasks(S * H, threads, [&](int64_t task) {
    const int64_t first = cu_seqlens[task / H], length = cu_seqlens[task / H + 1] - first, head = task % H;
    if (length == 0) return;
    Work w(length, z);
    pack_keyed(kn, kr, first, head, length, z, 1.0f, w.keys);
    pack(values, first, head, length, Dv, w.values);
    clear(w.dkeys, length * z.Dk);
    clear(w.dvalues, length * Dv);
    for (int64_t q0 = 0; q0 < length; q0 += NR) {
      const int64_t rows = least(length - q0, NR), seen = q0 + rows;
      pack_keyed(qn, qr, first + q0, head, rows, z, scale, w.q);
      transpose(w.q, rows, z.Dk, w.q_t);
      pack(grad, first + q0, head, rows, Dv, w.d_o);
      for (int64_t i = 0; i < NR; ++i) w.top[i] = i < rows ? tops[head * N + first + q0 + i] : 0.0f;
      transpose(w.d_o, rows, Dv, w.do_t);
      gemm(seen, NR, z.Dk, {w.keys, z.Dk, 1}, w.q_t, NR, w.p, NR);
      gemm(seen, NR, Dv, {w.values, Dv, 1}, w.do_t, NR, w.ds, NR);
      softmax_backward(w, q0, seen);
      gemm(seen, Dv, rows, {w.p, NR, 1}, w.d_o, Dv, w.dvalues, Dv, true);
      gemm(seen, z.Dk, rows, {w.ds, NR, 1}, w.q, z.Dk, w.dkeys, z.Dk, true);
      gemm(rows, z.Dk, seen, {w.ds, 1, NR}, w.keys, z.Dk, w.dq, z.Dk);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t at = (first + q0 + i) * H + head;
        copy_scaled(w.dq + i * z.Dk, dq_nope + at * Dn, Dn, scale);
        copy_scaled(w.dq + i * z.Dk + Dn, dq_rope + at * Dr, Dr, scale);
      }
    }
    for (int64_t j = 0; j < length; ++j) {
      const int64_t at = (first + j) * H + head;
      copy_scaled(w.dkeys + j * z.Dk, dk_nope + at * Dn, Dn, 1.0f);
      copy_scaled(w.dkeys + j * z.Dk + Dn, dk_rope + (head * N + first + j) * Dr, Dr, 1.0f);
      copy_scaled(w.dvalues + j * Dv, dv + at * Dv, Dv, 1.0f);
    }
  });
}

}  // namespace DSFAST_ISA
