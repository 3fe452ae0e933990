// The softmax of scores kept transposed, [keys][lanes]: a query in each lane, so that nothing goes across lanes.
#pragma once
#include <cmath>

#include "terms.h"

namespace DSFAST_ISA {

// exp(score - top) as terms down the keys, [terms of keys][lanes]; floats may take the scores' place. top and total
// [lanes], the maximum and the sum of each query. lanes: of W.
inline void exponentials(const float* scores, int64_t keys, int64_t lanes, BuildTerm* exps, float* top, float* total) {
  constexpr int64_t PER = PER_TERM<BuildTerm>;
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

}  // namespace DSFAST_ISA
