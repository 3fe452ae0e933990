// The one matrix product every operator is built from, blocked in registers.
//
//   C[M, N] = A[M, K] B[K, N]        or  C += A B, the product summed first: long sums made of many calls round less
//
// A and C are float32, and so is B; the operands are rounded to bfloat16 first in a build for bfloat16 products
// (DSFAST_BFLOAT16, see terms.h). A may have any strides (so A or A^T), and so may B: where its rows are not
// contiguous, or far apart, it is packed first. What goes into several products can be made into terms, A, or packed,
// B, beforehand. The rows of C are contiguous. M rows are taken MR at a time, columns in panels of two vectors (at the
// end three, by fewer rows); the MR x 2W sums stay in registers over the whole of K.
#pragma once
#include "scratch.h"
#include "terms.h"
#include "transpose.h"

namespace DSFAST_ISA {

#if defined(__AVX512F__)
constexpr int MR = 12;  // 24 of 32 registers hold sums
#else
constexpr int MR = 6;  // 12 of 16
#endif
constexpr int NR = 2 * W;

// The sums of a tile, in registers; `panel`: from one panel of B, two vectors, to the next. The loops over them are
// unrolled by order: GCC else takes them to memory where the caller goes on with them.
template <int ROWS, int VECTORS, class Term>
DSFAST_INLINE void tile_sums(int64_t K, Terms<Term> a, const Term* b, int64_t ldb, int64_t panel,
                             vfloat (&sums)[ROWS][VECTORS]) {
#pragma GCC unroll 24
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j) sums[i][j] = vfloat{};
  const Term* ak = a.data;
  for (int64_t k = 0; k < K; ++k, ak += a.column, b += ldb) {
    decltype(load(b)) bk[VECTORS];
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j) bk[j] = load(b + j / 2 * panel + j % 2 * W);
#pragma GCC unroll 24
    for (int i = 0; i < ROWS; ++i) {
      const auto x = splat(ak[i * a.row]);
#pragma GCC unroll 8
      for (int j = 0; j < VECTORS; ++j) sums[i][j] = multiply_add(x, bk[j], sums[i][j]);
    }
  }
}

template <int ROWS, int VECTORS, class Term>
DSFAST_INLINE void tile(int64_t K, Terms<Term> a, const Term* b, int64_t ldb, float* c, int64_t ldc, bool accumulate,
                        int64_t panel = NR) {
  vfloat sums[ROWS][VECTORS];
  tile_sums(K, a, b, ldb, panel, sums);
#pragma GCC unroll 24
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j) {
      float* out = c + i * ldc + j * W;
      store(out, accumulate ? load(out) + sums[i][j] : sums[i][j]);
    }
}

// B's rows end after n floats, fewer than a vector, unless they are packed: then they are filled up.
template <bool PACKED>
DSFAST_INLINE vfloat load_end(const float* b, int64_t n) {
  return PACKED ? load(b) : load_part(b, n);
}
template <bool PACKED>
DSFAST_INLINE vint load_end(const Pair* b, int64_t) {
  static_assert(PACKED, "pairs are made by packing");
  return load(b);
}

// The last columns, fewer than a vector.
template <int ROWS, bool PACKED, class Term>
DSFAST_INLINE void tile_part(int64_t K, int64_t n, Terms<Term> a, const Term* b, int64_t ldb, float* c, int64_t ldc,
                             bool accumulate) {
  vfloat sums[ROWS];
  for (int i = 0; i < ROWS; ++i) sums[i] = vfloat{};
  const Term* ak = a.data;
  for (int64_t k = 0; k < K; ++k, ak += a.column, b += ldb) {
    const auto bk = load_end<PACKED>(b, n);
    for (int i = 0; i < ROWS; ++i) sums[i] = multiply_add(splat(ak[i * a.row]), bk, sums[i]);
  }
  for (int i = 0; i < ROWS; ++i) store_part(c + i * ldc, accumulate ? load_part(c + i * ldc, n) + sums[i] : sums[i], n);
}

template <int ROWS>
struct Rows {
  static constexpr int value = ROWS;
};

// f(Rows<n>, i) for blocks of n rows, MOST if they can be, that cover 0..M, largest first.
template <int MOST = MR, class F>
DSFAST_INLINE void for_row_blocks(int64_t M, F f) {
  int64_t i = 0;
  for (; i + MOST <= M; i += MOST) f(Rows<MOST>{}, i);
  if (MOST > 8 && i + 8 <= M) {
    f(Rows<8>{}, i);
    i += 8;
  }
  for (; i + 4 <= M; i += 4) f(Rows<4>{}, i);
  if (i + 2 <= M) {
    f(Rows<2>{}, i);
    i += 2;
  }
  if (i < M) f(Rows<1>{}, i);
}

// K terms. B's rows are ldb apart, its panels of NR columns `panel`; PACKED: its last vector is filled up.
template <bool PACKED, class Term>
__attribute__((noinline)) inline void gemm_slice(int64_t M, int64_t N, int64_t K, Terms<Term> a, const Term* b,
                                                 int64_t ldb, int64_t panel, float* c, int64_t ldc, bool accumulate) {
  // Panels outside, rows inside: one panel of B stays in the first-level cache while A streams past.
  int64_t j = 0;
  const bool three = N % NR / W == 1 && N > NR;  // vectors in the last tile
  for (; j + NR <= N - three * (NR + N % NR); j += NR, b += panel)
    for_row_blocks(M, [&](auto rows, int64_t i) {
      tile<rows.value, 2>(K, a.rows_from(i), b, ldb, c + i * ldc + j, ldc, accumulate);
    });
  if (three) {  // one vector alone would ask for as many numbers of A as for terms of B
    for_row_blocks<MR * 2 / 3>(M, [&](auto rows, int64_t i) {
      tile<rows.value, 3>(K, a.rows_from(i), b, ldb, c + i * ldc + j, ldc, accumulate, panel);
    });
    j += NR + W;
    b += panel + W;
  } else if (j + W <= N) {
    for_row_blocks(M, [&](auto rows, int64_t i) {
      tile<rows.value, 1>(K, a.rows_from(i), b, ldb, c + i * ldc + j, ldc, accumulate);
    });
    j += W;
    b += W;
  }
  if (j < N)
    for_row_blocks(M, [&](auto rows, int64_t i) {
      tile_part<rows.value, PACKED>(K, N - j, a.rows_from(i), b, ldb, c + i * ldc + j, ldc, accumulate);
    });
}

// Numbers along K that are summed in registers before they are added to C: bounds the rounding, and B's panel in the
// cache.
constexpr int64_t KC = 256;
// Terms of A that meet all of B before the next rows do: with a panel of B they fit the first-level cache.
constexpr int64_t A_BLOCK = 6144;
// Terms of packed B: a part of the second-level cache.
constexpr int64_t B_BLOCK = 65536;

DSFAST_INLINE int64_t rows_at_once(int64_t terms) { return largest(A_BLOCK / (terms + 1) / MR * MR, MR); }

// `count` columns of a row of B from column j on, or nothing.
DSFAST_INLINE vfloat load_row(Matrix b, int64_t j, int64_t count) {
  if (count <= 0) return vfloat{};
  const float* from = b.data + j * b.column;
  if (b.column == 1) return load_n(from, count);
  vfloat x = {};
  for (int64_t i = 0; i < count; ++i) x[i] = from[i * b.column];
  return x;
}

// B [K, N] as terms: panels of NR columns, each [terms of K][NR]; where the columns end a vector is filled up with
// zeros.
template <class Term>
struct Packed {
  const Term* terms;
  int64_t N, K;
  int64_t panel;  // terms from one panel to the next
  // Rows k .. k + depth, k a multiple of PER_TERM; columns from j on, a multiple of NR.
  Packed rows(int64_t k, int64_t depth) const { return {terms + k / PER_TERM<Term> * NR, N, depth, panel}; }
  Packed columns_from(int64_t j) const { return {terms + j / NR * panel, N - j, K, panel}; }
};
using PackedB = Packed<BuildTerm>;

template <class Term>
DSFAST_INLINE int64_t panel_size(int64_t K) {
  return terms_of<Term>(K) * NR;
}
// Terms that [K, N] takes.
template <class Term>
DSFAST_INLINE int64_t packed_size(int64_t N, int64_t K) {
  return (N + NR - 1) / NR * panel_size<Term>(K);
}

// The i-th of matrices [K, N] that lie packed one behind the other.
template <class Term>
DSFAST_INLINE Packed<Term> packed_at(const Term* terms, int64_t N, int64_t K, int64_t i = 0) {
  return {terms + i * packed_size<Term>(N, K), N, K, panel_size<Term>(K)};
}

// A panel's W columns from j on, out [terms of K][NR].
inline void pack_columns(int64_t K, int64_t count, Matrix b, int64_t j, float* out) {
  for (int64_t k = 0; k < K; ++k, out += NR) store(out, load_row(b.rows_from(k), j, count));
}
inline void pack_columns(int64_t K, int64_t count, Matrix b, int64_t j, Pair* out) {
  for (int64_t k = 0; k < K; k += 2, out += NR) {
    const vfloat first = load_row(b.rows_from(k), j, count);
    store(out, pairs(first, k + 1 < K ? load_row(b.rows_from(k + 1), j, count) : vfloat{}));
  }
}

// The same where columns are contiguous: W terms of W columns, turned.
template <class Term>
inline void pack_turned(int64_t K, int64_t count, Matrix b, int64_t j, Term* out) {
  constexpr int64_t DEPTH = W * PER_TERM<Term>;
  for (int64_t k = 0; k < K; k += DEPTH) {
    vfloat terms[W];
#pragma GCC unroll 16
    for (int64_t i = 0; i < W; ++i)
      terms[i] = i < count ? neighbours(b.data + (j + i) * b.column + k, least(K - k, DEPTH), Term()) : vfloat{};
    transpose(terms);
    const int64_t rows = terms_of<Term>(least(K - k, DEPTH));
#pragma GCC unroll 16
    for (int64_t i = 0; i < W; ++i)
      if (i < rows) store(reinterpret_cast<float*>(out + i * NR), terms[column(int(i))]);
    out += W * NR;
  }
}

template <class Term>
inline Packed<Term> pack_b(int64_t N, int64_t K, Matrix b, Term* memory) {
  const int64_t panel = panel_size<Term>(K);
  for (int64_t j = 0; j < N; j += W) {
    Term* out = memory + j / NR * panel + j % NR;
    const int64_t count = least(N - j, W);
    if (b.row == 1 && b.column != 1)
      pack_turned(K, count, b, j, out);
    else
      pack_columns(K, count, b, j, out);
  }
  return {memory, N, K, panel};
}

// A [M, K] as terms: floats are taken where they lie, pairs are made in `memory`, of packed_a_size.
DSFAST_INLINE int64_t packed_a_size(int64_t M, int64_t K) { return (M + W) * terms_of<BuildTerm>(K + 1); }
DSFAST_INLINE Matrix packed_a(int64_t, int64_t, Matrix a, float*) { return a; }
inline Terms<Pair> packed_a(int64_t M, int64_t K, Matrix a, Pair* memory) {
  const int64_t terms = terms_of<Pair>(K);
  if (a.row == 1) {  // A^T: pairs of rows, W columns at a time
    const int64_t row = (M + W - 1) / W * W;
    for (int64_t k = 0; k < K; k += 2)
      for (int64_t i = 0; i < M; i += W) {
        const int64_t count = least(M - i, W);
        const float* from = a.data + k * a.column + i;
        store(memory + k / 2 * row + i,
              pairs(load_n(from, count), k + 1 < K ? load_n(from + a.column, count) : vfloat{}));
      }
    return {memory, 1, row};
  }
  for (int64_t i = 0; i < M; ++i) {
    const float* from = a.data + i * a.row;
    Pair* to = memory + i * terms;
    if (a.column == 1)
      for_vectors(terms, [&](int64_t k, int64_t count) {
        store_n(reinterpret_cast<float*>(to + k), neighbours(from + 2 * k, K - 2 * k, Pair()), count);
      });
    else
      for (int64_t k = 0; k < K; k += 2)
        to[k / 2] = pair(from[k * a.column], k + 1 < K ? from[(k + 1) * a.column] : 0.0f);
  }
  return {memory, terms, 1};
}

// A from column k on, counted in numbers, a multiple of PER_TERM.
template <class Term>
DSFAST_INLINE Terms<Term> from_number(Terms<Term> a, int64_t k) {
  return a.columns_from(k / PER_TERM<Term>);
}

// Rows i .. i + M and columns k .. k + K of A as terms, made in `memory` if need be.
template <class Term>
DSFAST_INLINE Terms<Term> part_of_a(Terms<Term> a, int64_t i, int64_t, int64_t k, int64_t, Term*) {
  return from_number(a.rows_from(i), k);
}
DSFAST_INLINE Terms<Pair> part_of_a(Matrix a, int64_t i, int64_t M, int64_t k, int64_t K, Pair* memory) {
  return packed_a(M, K, a.rows_from(i).columns_from(k), memory);
}

// Columns of B whose terms stay in the second-level cache.
DSFAST_INLINE int64_t columns_at_once(int64_t terms) { return largest(B_BLOCK / (terms + 1) / NR * NR, NR); }

// A as numbers or as terms, B packed.
template <class A, class Term>
inline void gemm(int64_t M, A a, Packed<Term> b, float* c, int64_t ldc, bool accumulate = false) {
  for (int64_t k = 0; k < b.K || k == 0; k += KC) {
    const int64_t depth = least(b.K - k, KC), terms = terms_of<Term>(depth);
    const int64_t rows = rows_at_once(terms), columns = columns_at_once(terms);
    Term* memory = reinterpret_cast<Term*>(dsfast::scratch((rows + W) * (terms + 1), dsfast::FIRST_FACTORS));
    for (int64_t j = 0; j < b.N; j += columns)
      for (int64_t i = 0; i < M; i += rows) {
        const int64_t m = least(M - i, rows);
        gemm_slice<true, Term>(m, least(b.N - j, columns), terms, part_of_a(a, i, m, k, depth, memory),
                               b.rows(k, depth).columns_from(j).terms, NR, b.panel, c + i * ldc + j, ldc,
                               accumulate || k > 0);
      }
  }
}

// B as numbers, packed a part at a time.
template <class Term, class A>
inline void gemm_packed(int64_t M, int64_t N, int64_t K, A a, Matrix b, float* c, int64_t ldc, bool accumulate) {
  for (int64_t k = 0; k < K || k == 0; k += KC) {
    const int64_t depth = least(K - k, KC), columns = columns_at_once(terms_of<Term>(depth));
    const int64_t size = packed_size<Term>(least(N, columns), depth);
    Term* memory = reinterpret_cast<Term*>(dsfast::scratch(size, dsfast::SECOND_FACTORS));
    for (int64_t j = 0; j < N; j += columns)
      gemm(M, from_number(a, k), pack_b(least(N - j, columns), depth, b.rows_from(k).columns_from(j), memory), c + j,
           ldc, accumulate || k > 0);
  }
}

inline void gemm_float32(int64_t M, int64_t N, int64_t K, Matrix a, Matrix b, float* c, int64_t ldc, bool accumulate) {
  // Rows of B a memory page and more apart: a panel of them would take a page each, and few sets of the cache.
  if (b.column != 1 || (b.row >= 1024 && M >= 2 * MR)) return gemm_packed<float>(M, N, K, a, b, c, ldc, accumulate);
  for (int64_t k = 0; k < K || k == 0; k += KC) {
    const int64_t terms = least(K - k, KC), rows = rows_at_once(terms);
    for (int64_t i = 0; i < M; i += rows)
      gemm_slice<false>(least(M - i, rows), N, terms, a.rows_from(i).columns_from(k), b.data + k * b.row, b.row, NR,
                        c + i * ldc, ldc, accumulate || k > 0);
  }
}

inline void gemm(int64_t M, int64_t N, int64_t K, Matrix a, Matrix b, float* c, int64_t ldc, bool accumulate = false) {
#if defined(DSFAST_BFLOAT16)
  gemm_packed<Pair>(M, N, K, a, b, c, ldc, accumulate);
#else
  gemm_float32(M, N, K, a, b, c, ldc, accumulate);
#endif
}

}  // namespace DSFAST_ISA
