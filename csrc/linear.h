// y = x w^T, as PyTorch's linear layers keep w: [O, D]; and its derivative.
#pragma once
#include "carver.h"
#include "gemm.h"
#include "parallel.h"

namespace DSFAST_ISA {

// A row length of at least `width` floats and an odd number of cache lines: rows a power of two apart share few sets of
// the first-level cache, and a product that goes down a column throws out what it has just read.
DSFAST_INLINE int64_t padded(int64_t width) { return ((width + LINE - 1) / LINE | 1) * LINE; }

// `copies` weights [O, D], one after the other. Small ones are packed beforehand as the second factors of a forward and
// of a backward pass; others are left to each product.
template <class Term>
class Weight {
 public:
  static constexpr int64_t SMALL = 1 << 18;

  const float* numbers;
  int64_t copies, O, D;

  // To be filled, for the passes that are wanted; numbers null: there is none.
  Weight(Carver& c, const float* numbers, int64_t copies, int64_t O, int64_t D, bool forward = true,
         bool backward = true)
      : numbers(numbers), copies(numbers == nullptr ? 0 : copies), O(O), D(D) {
    if (O * D > SMALL) return;
    if (forward) across = c.of<Term>(this->copies * packed_size<Term>(O, D));
    if (backward) along = c.of<Term>(this->copies * packed_size<Term>(D, O));
  }
  void fill(int threads) const {
    parallel_ranges(copies, threads, [&](int, int64_t begin, int64_t end) {
      for (int64_t copy = begin; copy < end; ++copy) {
        if (across != nullptr) pack_b(O, D, transposed(copy), across + copy * packed_size<Term>(O, D));
        if (along != nullptr) pack_b(D, O, plain(copy), along + copy * packed_size<Term>(D, O));
      }
    });
  }

  // y [N, O] = x w^T, or added to it; x as numbers or terms.
  template <class X>
  void forward(int64_t N, X x, float* y, int64_t y_row, bool add = false, int64_t copy = 0) const {
    product(N, O, D, x, across, transposed(copy), y, y_row, add, copy);
  }
  // dx [N, D] = dy w, or added to it.
  void backward(int64_t N, Matrix dy, float* dx, int64_t dx_row, bool add = false, int64_t copy = 0) const {
    product(N, D, O, dy, along, plain(copy), dx, dx_row, add, copy);
  }

 private:
  Term *across = nullptr, *along = nullptr;

  Matrix plain(int64_t copy) const { return {numbers + copy * O * D, D, 1}; }
  Matrix transposed(int64_t copy) const { return {numbers + copy * O * D, 1, D}; }
  template <class X>
  static void product(int64_t M, int64_t N, int64_t K, X x, const Term* packed, Matrix w, float* y, int64_t y_row,
                      bool add, int64_t copy) {
    if (packed != nullptr)
      gemm(M, x, packed_at(packed, N, K, copy), y, y_row, add);
    else if constexpr (PER_TERM<Term> == 1)
      gemm_float32(M, N, K, x, w, y, y_row, add);
    else
      gemm_packed<Term>(M, N, K, x, w, y, y_row, add);
  }
};
using BuildWeight = Weight<BuildTerm>;

// One weight packed for one pass, in this thread's memory.
inline BuildWeight packed_weight(const float* numbers, int64_t O, int64_t D, bool forward) {
  const auto w =
      carved(dsfast::WEIGHTS, [&](Carver& c) { return BuildWeight(c, numbers, 1, O, D, forward, !forward); });
  w.fill(1);
  return w;
}

// x [N, D] packed. dw [O, D] is added to, dx [N, D] too if `add`.
template <class Term>
DSFAST_INLINE void linear_backward(int64_t N, const Weight<Term>& w, Matrix dy, const Packed<Term>& x, float* dx,
                                   int64_t dx_row, float* dw, bool add = false) {
  w.backward(N, dy, dx, dx_row, add);
  gemm(w.O, Matrix{dy.data, 1, dy.row}, x, dw, w.D, true);
}

}  // namespace DSFAST_ISA
