// What a matrix product multiplies: a Term is a float, or a Pair of bfloat16 that follow each other along K. Sums are
// float32 either way.
#pragma once
#include "simd.h"

namespace DSFAST_ISA {

typedef int32_t Pair;  // the first in the low half
constexpr vint HIGH_HALF = vint{} - 65536;

template <class Term>
struct Terms {
  const Term* data;
  int64_t row, column;  // strides, in terms
  DSFAST_INLINE Terms rows_from(int64_t i) const { return {data + i * row, row, column}; }
  DSFAST_INLINE Terms columns_from(int64_t k) const { return {data + k * column, row, column}; }
};
using Matrix = Terms<float>;

template <class Term>
constexpr int64_t PER_TERM = 1;  // numbers along K
template <>
inline constexpr int64_t PER_TERM<Pair> = 2;

// Terms that K numbers make; the last may be half empty.
template <class Term>
DSFAST_INLINE int64_t terms_of(int64_t K) {
  return (K + PER_TERM<Term> - 1) / PER_TERM<Term>;
}

// What this build multiplies, and exponentials that are made into it. Those in base 2 take the factor PER_LN2 and the
// difference as one instruction.
constexpr float PER_LN2 = 1.44269504f;
#if defined(DSFAST_BFLOAT16)
using BuildTerm = Pair;
DSFAST_INLINE vfloat exp2_of(vfloat x) { return exp2<3>(x); }
DSFAST_INLINE vfloat exp_of_difference(vfloat x, vfloat y) { return exp2<3>(x * PER_LN2 - y * PER_LN2); }
#else
using BuildTerm = float;
DSFAST_INLINE vfloat exp2_of(vfloat x) { return exp2<4>(x); }
DSFAST_INLINE vfloat exp_of_difference(vfloat x, vfloat y) { return exp(x - y); }
#endif

DSFAST_INLINE vint load(const Pair* p) {
  typedef int32_t vint_unaligned __attribute__((vector_size(4 * W), aligned(4), may_alias));
  return *reinterpret_cast<const vint_unaligned*>(p);
}
DSFAST_INLINE void store(Pair* p, vint x) { store(reinterpret_cast<float*>(p), (vfloat)x); }
DSFAST_INLINE vint splat(Pair x) { return x - vint{}; }

DSFAST_INLINE vfloat multiply_add(vfloat a, vfloat b, vfloat sum) { return sum + a * b; }
DSFAST_INLINE vfloat multiply_add(vint a, vint b, vfloat sum) {
#if defined(__AVX512BF16__)
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#else
  sum += (vfloat)(a << 16) * (vfloat)(b << 16);
  return sum + (vfloat)(a & HIGH_HALF) * (vfloat)(b & HIGH_HALF);
#endif
}

typedef int32_t vhalf __attribute__((vector_size(2 * W)));
DSFAST_INLINE void store(Pair* p, vhalf x) {
  typedef vhalf vhalf_unaligned __attribute__((aligned(4), may_alias));
  *reinterpret_cast<vhalf_unaligned*>(p) = x;
}

// Two rows of W numbers in bfloat16, rounded to the nearest, ties to even; NaN stays NaN.
#if defined(__AVX512BF16__)
class TwoRows {
  vint both;

 public:
  DSFAST_INLINE TwoRows(vfloat first, vfloat second) : both((vint)_mm512_cvtne2ps_pbh(second, first)) {}
  // W / 2 pairs of neighbours of the first row, of the second, and the one behind the other.
  DSFAST_INLINE vhalf along_first() const { return (vhalf)_mm512_castsi512_si256((__m512i)both); }
  DSFAST_INLINE vhalf along_second() const { return (vhalf)_mm512_extracti64x4_epi64((__m512i)both, 1); }
  DSFAST_INLINE vint along() const { return both; }
  // W pairs of a number of the first and one of the second.
  DSFAST_INLINE vint down() const {
    typedef uint16_t places __attribute__((vector_size(4 * W)));
    constexpr places TURNS = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                              8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return (vint)_mm512_permutexvar_epi16((__m512i)TURNS, (__m512i)both);
  }
};
#else
class TwoRows {
  vint first, second;  // in the high halves; the low ones are left as they come

  static DSFAST_INLINE vint rounded(vfloat x) {
    const vint bits = (vint)x;
    const vint nearest = bits + 0x7fff + ((bits >> 16) & 1), quiet = bits | 0x400000;
    const vint number = x == x;
    return (nearest & number) | (quiet & ~number);
  }
  static DSFAST_INLINE vhalf neighbours(vint row) {
    typedef uint64_t vlong __attribute__((vector_size(4 * W)));
    const vlong two = (vlong)row;  // the first of two neighbours in the low half
    return __builtin_convertvector(((two >> 16) & 0xffff) | ((two >> 32) & 0xffff0000), vhalf);
  }

 public:
  DSFAST_INLINE TwoRows(vfloat first, vfloat second) : first(rounded(first)), second(rounded(second)) {}
  DSFAST_INLINE vhalf along_first() const { return neighbours(first); }
  DSFAST_INLINE vhalf along_second() const { return neighbours(second); }
  DSFAST_INLINE vint along() const {
    Pair both[W];
    store(both, along_first());
    store(both + W / 2, along_second());
    return load(both);
  }
  DSFAST_INLINE vint down() const { return ((first >> 16) & 0xffff) | (second & HIGH_HALF); }
};
#endif

// Pair i holds first[i] and second[i].
DSFAST_INLINE vint pairs(vfloat first, vfloat second) { return TwoRows(first, second).down(); }

// The terms of W PER_TERM neighbours, of which `count` are there; the others are zero. As bits of a vfloat.
DSFAST_INLINE vfloat neighbours(const float* from, int64_t count, float) {
  return count >= W ? load(from) : load_part(from, largest(count, 0));
}

DSFAST_INLINE vfloat neighbours(const float* from, int64_t count, Pair) {
  return (vfloat)TwoRows(neighbours(from, count, 0.0f), neighbours(from + W, count - W, 0.0f)).along();
}

DSFAST_INLINE Pair pair(float first, float second) { return pairs(splat(first), splat(second))[0]; }

// PER_TERM rows of numbers, W of each, as terms two ways: along the rows, which are `row` terms apart, and down the
// rows (null: not wanted). Floats are the same number either way and go to `along`, else to `down`.
DSFAST_INLINE void store_terms(const vfloat (&rows)[1], float* along, int64_t, float* down) {
  store(along != nullptr ? along : down, rows[0]);
}
DSFAST_INLINE void store_terms(const vfloat (&rows)[2], Pair* along, int64_t row, Pair* down) {
  const TwoRows rounded(rows[0], rows[1]);
  if (along != nullptr) {
    store(along, rounded.along_first());
    store(along + row, rounded.along_second());
  }
  if (down != nullptr) store(down, rounded.down());
}

}  // namespace DSFAST_ISA
