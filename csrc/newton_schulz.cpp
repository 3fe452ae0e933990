// Muon's orthogonalisation, every matrix by itself; see dsfast/ops/newton_schulz.py.
#include "kernels.h"
#include "orthogonalise.h"
#include "parallel.h"

namespace DSFAST_ISA {

void newton_schulz(const float* x, float* out, const int64_t* shapes, int64_t stacks, float a, float b, float c,
                   float eps, int64_t iterations, int threads) {
  parallel_tasks(matrices(shapes, stacks), threads, [&](int64_t i) {
    const int64_t* shape = shapes;
    int64_t begin = 0;
    for (; i >= shape[0]; i -= shape[0], shape += 3) begin += shape[0] * shape[1] * shape[2];
    begin += i * shape[1] * shape[2];
    float* memory = dsfast::scratch(orthogonalise_memory(shape[1], shape[2]));
    orthogonalise({a, b, c, eps, iterations}, x + begin, out + begin, memory, shape[1], shape[2]);
  });
}

}  // namespace DSFAST_ISA
