// What one thread does of each operator, on tokens it has for itself. The operators share their tokens out and call
// these; train_step composes a whole model of them. Shapes as in kernels.h; where a gradient is said to be added to, it
// is the sum of what several calls found. Working memory is this thread's scratch memory where none is handed in.
#pragma once
#include <cstdint>

#include "carver.h"
#include "expert.h"
#include "gemm.h"
#include "linear.h"

namespace DSFAST_ISA {

void rms_norm_rows(const float* x, int64_t x_row, const float* residual, int64_t residual_row, const float* weight,
                   float eps, float* y, int64_t y_row, float* h, float* rstd, int64_t N, int64_t D);
// dweight [D] is added to; memory [D]. dx may be dh.
void rms_norm_rows_backward(const float* dy, int64_t dy_row, const float* dh, int64_t dh_row, const float* h,
                            int64_t h_row, const float* weight, const float* rstd, float* dx, int64_t dx_row,
                            float* dweight, float* memory, int64_t N, int64_t D);

// y may be x.
void rope_rows(const float* x, int64_t x_token, int64_t x_head, const float* cos, const float* sin,
               const int64_t* positions, float* y, int64_t y_token, int64_t y_head, int64_t N, int64_t H, int64_t Dr,
               bool inverse);

// projection [R, D] (numbers null: none, and D = R) is a layer from D to R that is gone through backwards.
void embedding_rows(const int64_t* ids, const float* table, int64_t table_row, const BuildWeight& projection, float* y,
                    float* memory, int64_t N, int64_t R, int64_t D);
// dprojection is added to; taken_grad [N, R] is the gradient of each token's row of the table; memory:
// embedding_memory, in both.
void embedding_rows_backward(const float* dy, int64_t dy_row, const int64_t* ids, const float* table, int64_t table_row,
                             const BuildWeight& projection, float* taken_grad, float* dprojection, float* memory,
                             int64_t N, int64_t R, int64_t D);
int64_t embedding_memory(int64_t R);

// A [token, head, width] array by its strides.
template <class Float>
struct Strided {
  Float* data;
  int64_t token, head;
  DSFAST_INLINE Float* at(int64_t n, int64_t h) const { return data + n * token + h * head; }
  DSFAST_INLINE Strided from(int64_t n) const { return {data + n * token, token, head}; }
};
using View = Strided<const float>;
using Slots = Strided<float>;

// The inputs of one document, or their gradients: from its first token on.
template <class Float>
struct AttentionParts {
  Strided<Float> q_nope, q_rope, k_nope, k_rope, v;
  AttentionParts from(int64_t n) const {
    return {q_nope.from(n), q_rope.from(n), k_nope.from(n), k_rope.from(n), v.from(n)};
  }
};

struct AttentionSizes {
  int64_t Dn, Dr, Dv;
  float scale;
  int64_t Dk() const { return Dn + Dr; }
};

// One head of one document of `length` tokens; tops [length].
void attend(const AttentionParts<const float>& in, int64_t length, int64_t head, const AttentionSizes& z, Slots o,
            float* tops);
// Gradients are written; that of k_rope is added to if `add_k_rope`.
void attend_backward(const AttentionParts<const float>& in, View d_o, const float* tops, int64_t length, int64_t head,
                     const AttentionSizes& z, const AttentionParts<float>& grads, bool add_k_rope);

// y is added to if `add`; memory: z.forward_memory().
void swiglu_rows(const Expert& z, const float* x, int64_t x_row, const BuildWeight& gate_up, const BuildWeight& down,
                 float* y, float* gu, float* memory, int64_t N, bool add);
// dgate_up and ddown are added to, dx if `add`; memory: z.backward_memory().
void swiglu_rows_backward(const Expert& z, const float* dy, int64_t dy_row, const float* x, int64_t x_row,
                          const BuildWeight& gate_up, const BuildWeight& down, const float* gu, float* dx,
                          float* dgate_up, float* ddown, float* memory, int64_t N, bool add);

struct Experts {
  Expert each;
  int64_t K, E;
  // Floats of working memory for `experts_forward` and `experts_backward`.
  int64_t forward_memory() const { return each.forward_memory() + 2 * each.block() * each.D; }
  int64_t backward_memory() const { return each.backward_memory() + each.block() * (3 * each.D + 2); }
};

// How many blocks the experts' slots are worked on in; the next two work on the blocks begin .. end.
int64_t count_blocks(const Experts& z, const int32_t* offsets);
// slots [N K, D]: each slot's result times its weight, in the order of the tokens.
void experts_forward(const Experts& z, const float* x, int64_t x_row, const float* weights, const BuildWeight& gate_up,
                     const BuildWeight& down, const int32_t* order, const int32_t* offsets, float* slots, float* gu,
                     float* memory, int64_t begin, int64_t end);
// dgate_up [E, 2I, D] and ddown [E, D, I] are added to; slots [N K, D] is each slot's share of dx.
void experts_backward(const Experts& z, const float* dy, int64_t dy_row, const float* x, int64_t x_row,
                      const float* weights, const BuildWeight& gate_up, const BuildWeight& down, const float* gu,
                      const int32_t* order, const int32_t* offsets, float* slots, float* dweights, float* dgate_up,
                      float* ddown, float* memory, int64_t begin, int64_t end);
// out[n] = sum of the K slots of token n, in the order of the choices
void combine_slots(const float* slots, float* out, int64_t N, int64_t K, int64_t D, int threads);

// The head's weight [V, R]; of a narrow one also what its products read, a chunk of words after the other.
class HeadWeight {
 public:
  // Words at a time: so few that their exponentials, weights, hidden and its gradient fit the nearest caches; where
  // they are too wide for that, so many that the gradient is seldom gone through.
  static constexpr int64_t NARROW = 144, WIDE = 480;

  const float* numbers;
  int64_t V, R;

  // To be filled; with_grads: as a second factor, too.
  HeadWeight(const float* numbers, int64_t V, int64_t R, bool with_grads, Carver& c) : numbers(numbers), V(V), R(R) {
    if (!narrow()) return;
    if (PER_TERM<BuildTerm> > 1) terms = c.of<BuildTerm>(packed_a_size(V, R));
    if (with_grads) packed = c.of<BuildTerm>(chunks() * packed_size<BuildTerm>(R, NARROW));
  }
  void fill(int threads) const;
  // Whether a logit's sum is short enough to stay in a register.
  bool narrow() const { return R <= KC; }
  int64_t chunk() const { return narrow() ? NARROW : WIDE; }
  int64_t chunks() const { return (V + chunk() - 1) / chunk(); }

  // The words from v on.
  Matrix words(int64_t v) const { return {numbers + v * R, R, 1}; }
  // The same of a narrow weight as a first factor, and of the chunk that begins with word v as a second one.
  Terms<BuildTerm> rows(int64_t v) const { return rows_of(v, BuildTerm()); }
  PackedB columns(int64_t v) const {
    const int64_t count = least(V - v, NARROW);
    return packed_at<BuildTerm>(packed + v / NARROW * packed_size<BuildTerm>(R, NARROW), R, count);
  }

 private:
  BuildTerm *terms = nullptr, *packed = nullptr;
  Matrix rows_of(int64_t v, float) const { return words(v); }
  Terms<Pair> rows_of(int64_t v, Pair) const {
    const int64_t row = terms_of<Pair>(R);
    return {reinterpret_cast<const Pair*>(terms) + v * row, row, 1};
  }
};

// The sum of the losses. With gradients (dhidden not null) dhidden is written and dweight added to, or written if
// `first`; share is what each loss counts in them. Labels must be in range.
double linear_cross_entropy_rows(const float* hidden, int64_t hidden_row, const HeadWeight& head, const int64_t* labels,
                                 int64_t ignore_index, float share, float* dhidden, float* dweight, bool first,
                                 int64_t N);

}  // namespace DSFAST_ISA
