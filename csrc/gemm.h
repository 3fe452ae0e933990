// The one matrix product every operator is built from, blocked in registers.
//
//   C[M, N] = A[M, K] B[K, N]        or  C += A B, the product summed first: long sums made of many calls round less
//
// A and C are float32, and so is B; the operands are rounded to bfloat16 first in a build for bfloat16 products
// (DSFAST_BFLOAT16, see terms.h). A may have any strides (so A or A^T), and so may B: where its rows are not
// contiguous, or far apart, it is packed first. The rows of C are contiguous. M rows are taken MR at a time, columns in
// panels of two vectors; the MR x 2W sums stay in registers over the whole of K.
#pragma once
#include "scratch.h"
#include "terms.h"

namespace DSFAST_ISA {

#if defined(__AVX512F__)
constexpr int MR = 12;  // 24 of 32 registers hold sums
#else
constexpr int MR = 6;  // 12 of 16
#endif
constexpr int NR = 2 * W;

template <int ROWS, int VECTORS, class Term>
DSFAST_INLINE void tile(int64_t K, Terms<Term> a, const Term* b, int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  vfloat sums[ROWS][VECTORS];
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < VECTORS; ++j) sums[i][j] = vfloat{};
  const Term* ak = a.data;
  for (int64_t k = 0; k < K; ++k, ak += a.column, b += ldb) {
    decltype(load(b)) bk[VECTORS];
    for (int j = 0; j < VECTORS; ++j) bk[j] = load(b + j * W);
    for (int i = 0; i < ROWS; ++i) {
      const auto x = splat(ak[i * a.row]);
      for (int j = 0; j < VECTORS; ++j) sums[i][j] = multiply_add(x, bk[j], sums[i][j]);
    }
  }
  for (int i = 0; i < ROWS; ++i)
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

// f(Rows<n>, i) for blocks of n rows that cover 0..M, largest first.
template <class F>
DSFAST_INLINE void for_row_blocks(int64_t M, F f) {
  int64_t i = 0;
  for (; i + MR <= M; i += MR) f(Rows<MR>{}, i);
  if (MR > 8 && i + 8 <= M) {
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

// K terms. B's rows are ldb apart; its panels of NR columns stand side by side in them, or if PACKED one after the
// other.
template <bool PACKED, class Term>
__attribute__((noinline)) inline void gemm_slice(int64_t M, int64_t N, int64_t K, Terms<Term> a, const Term* b,
                                                 int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  const int64_t panel = PACKED ? K * NR : NR;
  // Panels outside, rows inside: one panel of B stays in the first-level cache while A streams past.
  int64_t j = 0;
  for (; j + NR <= N; j += NR, b += panel)
    for_row_blocks(M, [&](auto rows, int64_t i) {
      tile<rows.value, 2>(K, a.rows_from(i), b, ldb, c + i * ldc + j, ldc, accumulate);
    });
  if (j + W <= N) {
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
constexpr int64_t KC = 512;
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

// B [K, N] -> panels of NR columns one after the other, each [terms][NR], filled up with zeros.
inline void pack_b(int64_t N, int64_t K, Matrix b, float* out) {
  for (int64_t j = 0; j < N; j += NR)
    for (int64_t k = 0; k < K; ++k)
      for (int64_t v = 0; v < NR; v += W, out += W) store(out, load_row(b.rows_from(k), j + v, least(N - j - v, W)));
}
inline void pack_b(int64_t N, int64_t K, Matrix b, Pair* out) {
  for (int64_t j = 0; j < N; j += NR)
    for (int64_t k = 0; k < K; k += 2)
      for (int64_t v = 0; v < NR; v += W, out += W) {
        const int64_t count = least(N - j - v, W);
        const vfloat first = load_row(b.rows_from(k), j + v, count);
        store(out, pairs(first, k + 1 < K ? load_row(b.rows_from(k + 1), j + v, count) : vfloat{}));
      }
}

// A [M, K] as terms: floats are taken where they lie, pairs are made in `memory`.
DSFAST_INLINE Matrix packed_a(int64_t, int64_t, Matrix a, float*) { return a; }
inline Terms<Pair> packed_a(int64_t M, int64_t K, Matrix a, Pair* memory) {
  const int64_t terms = (K + 1) / 2;
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
    int64_t k = 0;
    if (a.column == 1)
      for (; k + W <= K; k += W) store_pairs(to + k / 2, load(from + k));
    for (; k < K; k += 2) to[k / 2] = pair(from[k * a.column], k + 1 < K ? from[(k + 1) * a.column] : 0.0f);
  }
  return {memory, terms, 1};
}

template <class Term>
inline void gemm_packed(int64_t M, int64_t N, int64_t K, Matrix a, Matrix b, float* c, int64_t ldc, bool accumulate) {
  for (int64_t k = 0; k < K || k == 0; k += KC) {
    const int64_t depth = least(K - k, KC), terms = (depth + PER_TERM<Term> - 1) / PER_TERM<Term>;
    const int64_t columns = largest(B_BLOCK / (terms + 1) / NR * NR, NR), rows = rows_at_once(terms);
    const int64_t panels = (least(N, columns) + NR - 1) / NR * NR * terms;
    Term* memory = reinterpret_cast<Term*>(dsfast::scratch(panels + (rows + W) * (terms + 1), dsfast::PRODUCTS));
    for (int64_t j = 0; j < N; j += columns) {
      const int64_t n = least(N - j, columns);
      pack_b(n, depth, b.rows_from(k).columns_from(j), memory);
      for (int64_t i = 0; i < M; i += rows) {
        const int64_t m = least(M - i, rows);
        gemm_slice<true, Term>(m, n, terms, packed_a(m, depth, a.rows_from(i).columns_from(k), memory + panels), memory,
                               NR, c + i * ldc + j, ldc, accumulate || k > 0);
      }
    }
  }
}

// B made into terms once, for many products: slices of KC numbers along K, one after the other, each as `pack_b` makes
// it.
struct PackedB {
  const BuildTerm* terms;
  int64_t N, K;
  static int64_t panels(int64_t N) { return (N + NR - 1) / NR * NR; }
  // Terms that [K, N] takes.
  static int64_t size(int64_t N, int64_t K) { return panels(N) * ((K + PER_BUILD_TERM - 1) / PER_BUILD_TERM); }
};

inline PackedB packed_b(int64_t N, int64_t K, Matrix b, BuildTerm* memory) {
  for (int64_t k = 0; k < K; k += KC) pack_b(N, least(K - k, KC), b.rows_from(k), memory + PackedB::size(N, k));
  return {memory, N, K};
}

// A given as numbers.
inline void gemm(int64_t M, Matrix a, PackedB b, float* c, int64_t ldc, bool accumulate = false) {
  for (int64_t k = 0; k < b.K || k == 0; k += KC) {
    const int64_t depth = least(b.K - k, KC), terms = PackedB::size(1, depth) / NR, rows = rows_at_once(terms);
    auto memory = reinterpret_cast<BuildTerm*>(dsfast::scratch((rows + W) * (terms + 1), dsfast::PRODUCTS));
    for (int64_t i = 0; i < M; i += rows) {
      const int64_t m = least(M - i, rows);
      gemm_slice<true, BuildTerm>(m, b.N, terms, packed_a(m, depth, a.rows_from(i).columns_from(k), memory),
                                  b.terms + PackedB::size(b.N, k), NR, c + i * ldc, ldc, accumulate || k > 0);
    }
  }
}

// A given as terms, at most KC numbers along K.
inline void gemm_of_terms(int64_t M, Terms<BuildTerm> a, PackedB b, float* c, int64_t ldc, bool accumulate) {
  gemm_slice<true, BuildTerm>(M, b.N, PackedB::size(1, b.K) / NR, a, b.terms, NR, c, ldc, accumulate);
}

using Product = void(int64_t M, int64_t N, int64_t K, Matrix a, Matrix b, float* c, int64_t ldc, bool accumulate);

inline void gemm_float32(int64_t M, int64_t N, int64_t K, Matrix a, Matrix b, float* c, int64_t ldc, bool accumulate) {
  // Rows of B a memory page and more apart: a panel of them would take a page each, and few sets of the cache.
  if (b.column != 1 || (b.row >= 1024 && M >= 2 * MR)) return gemm_packed<float>(M, N, K, a, b, c, ldc, accumulate);
  for (int64_t k = 0; k < K || k == 0; k += KC) {
    const int64_t terms = least(K - k, KC), rows = rows_at_once(terms);
    for (int64_t i = 0; i < M; i += rows)
      gemm_slice<false>(least(M - i, rows), N, terms, a.rows_from(i).columns_from(k), b.data + k * b.row, b.row,
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
