// y = x w^T, as PyTorch's linear layers keep w: [O, D]; and its derivative.
#pragma once
#include "carver.h"
#include "gemm.h"
#include "parallel.h"

namespace DSFAST_ISA {

// A row length of at least `width` floats and an odd number of cache lines: rows a power of two apart share few sets of
// the first-level cache, and a product that goes down a column throws out what it has just read.
DSFAST_INLINE int64_t padded(int64_t width) { return ((width + LINE - 1) / LINE | 1) * LINE; }

// `copies` weights [O, D], one after the other, packed as the second factors of a forward and of a backward pass.
template <class Term>
class Weight {
 public:
  const float* numbers = nullptr;
  int64_t copies = 0, O = 0, D = 0;

  Weight() = default;
  // To be filled, for the passes that are wanted; numbers null: there is none.
  Weight(Carver& c, const float* numbers, int64_t copies, int64_t O, int64_t D, bool forward = true,
         bool backward = true)
      : numbers(numbers), copies(numbers == nullptr ? 0 : copies), O(O), D(D) {
    if (forward) across = c.of<Term>(this->copies * packed_size<Term>(O, D));
    if (backward) along = c.of<Term>(this->copies * packed_size<Term>(D, O));
  }
  void fill(int64_t copy) const {
    const float* w = numbers + copy * O * D;
    if (across != nullptr) pack_b(O, D, {w, 1, D}, across + copy * packed_size<Term>(O, D));
    if (along != nullptr) pack_b(D, O, {w, D, 1}, along + copy * packed_size<Term>(D, O));
  }
  void fill_all(int threads) const {
    parallel_ranges(copies, threads, [&](int, int64_t begin, int64_t end) {
      for (int64_t copy = begin; copy < end; ++copy) fill(copy);
    });
  }

  // w^T [D, O], for y = x w^T, and w [O, D], for dx = dy w.
  Packed<Term> forward(int64_t copy = 0) const {
    return {across + copy * packed_size<Term>(O, D), O, D, panel_size<Term>(D)};
  }
  Packed<Term> backward(int64_t copy = 0) const {
    return {along + copy * packed_size<Term>(D, O), D, O, panel_size<Term>(O)};
  }

 private:
  Term *across = nullptr, *along = nullptr;
};
using BuildWeight = Weight<BuildTerm>;

// One weight packed for one pass, in this thread's memory.
inline BuildWeight packed_weight(const float* numbers, int64_t O, int64_t D, bool forward) {
  Carver count = {nullptr};
  BuildWeight(count, numbers, 1, O, D, forward, !forward);
  Carver carver = {dsfast::scratch(count.size, dsfast::WEIGHTS)};
  const BuildWeight w(carver, numbers, 1, O, D, forward, !forward);
  w.fill_all(1);
  return w;
}

// x [N, D] packed. dw [O, D] is added to, dx [N, D] too if `add`.
template <class Term>
DSFAST_INLINE void linear_backward(int64_t N, const Weight<Term>& w, Matrix dy, const Packed<Term>& x, float* dx,
                                   int64_t dx_row, float* dw, bool add = false) {
  gemm(N, dy, w.backward(), dx, dx_row, add);
  gemm(w.O, Matrix{dy.data, 1, dy.row}, x, dw, w.D, true);
}

}  // namespace DSFAST_ISA
