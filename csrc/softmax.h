// The softmax of scores kept transposed, [keys][lanes]: a query in each lane, so that nothing goes across lanes.
#pragma once
#include <cmath>

#include "simd.h"

namespace DSFAST_ISA {

// scores -> exp(score - top), in place; top and total [lanes], the maximum and the sum of each query. lanes: of W.
inline void exponentials(float* scores, int64_t keys, int64_t lanes, float* top, float* total) {
  for (int64_t part = 0; part < lanes; part += W) {
    vfloat high = splat(-INFINITY), added = {};
    for (int64_t j = 0; j < keys; ++j) high = maximum(high, load(scores + j * lanes + part));
    for (int64_t j = 0; j < keys; ++j) {
      const vfloat e = exp(load(scores + j * lanes + part) - high);
      store(scores + j * lanes + part, e);
      added += e;
    }
    store(top + part, high);
    store(total + part, added);
  }
}

}  // namespace DSFAST_ISA
