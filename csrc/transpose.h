// A square of W x W numbers turned in registers.
#pragma once
#include "simd.h"

namespace DSFAST_ISA {

// 0 .. W - 1 as template arguments.
template <int... L>
struct Numbers {};
template <int N, int... L>
struct Count : Count<N - 1, N - 1, L...> {};
template <int... L>
struct Count<0, L...> {
  using type = Numbers<L...>;
};

// Two rows of a matrix made of S x S blocks, S apart: the block right of the diagonal changes places with the one left
// of it. Written as a list of elements, which compilers turn into a shuffle.
template <int S, int... L>
DSFAST_INLINE void exchange(vfloat& a, vfloat& b, Numbers<L...>) {
  const vfloat x = a, y = b;
  a = vfloat{((L & S) ? y[L & ~S] : x[L])...};
  b = vfloat{((L & S) ? y[L] : x[L | S])...};
}

// In each four lanes: (x0 y0 x1 y1) and (x2 y2 x3 y3).
template <int... L>
DSFAST_INLINE void interleave(vfloat& a, vfloat& b, Numbers<L...>) {
  const vfloat x = a, y = b;
  a = vfloat{((L & 1) ? y[(L & ~3) + (L & 3) / 2] : x[(L & ~3) + (L & 3) / 2])...};
  b = vfloat{((L & 1) ? y[(L & ~3) + (L & 3) / 2 + 2] : x[(L & ~3) + (L & 3) / 2 + 2])...};
}

template <int S>
DSFAST_INLINE void exchange_all(vfloat (&rows)[W]) {
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    if ((i & S) == 0) exchange<S>(rows[i], rows[i + S], typename Count<W>::type{});
}

// Column i of the matrix comes to stand in rows[column(i)].
DSFAST_INLINE void transpose(vfloat (&rows)[W]) {
  if constexpr (W > 8) exchange_all<8>(rows);
  if constexpr (W > 4) exchange_all<4>(rows);
#pragma GCC unroll 16
  for (int i = 0; i < W; i += 2) interleave(rows[i], rows[i + 1], typename Count<W>::type{});
  exchange_all<2>(rows);
}
constexpr int column(int i) { return (i & ~3) | (i & 1) << 1 | (i & 2) >> 1; }

}  // namespace DSFAST_ISA
