// The kernels' signatures, declared once for each instruction set (DSFAST_ISA names the namespace), so no include
// guard. All matrices are row-major float32; `x_row` is the distance between rows of x in elements. Shape letters as in
// dsfast/ops/. Functions that return int64_t return how many indices were out of range, but where said otherwise; then
// the output is not valid.
#include <cstdint>

#include "model.h"

namespace DSFAST_ISA {

// h [N, D] is written only with a residual (may be null); rstd [N].
void rms_norm_forward(const float* x, int64_t x_row, const float* residual, int64_t residual_row, const float* weight,
                      float eps, float* y, float* h, float* rstd, int64_t N, int64_t D, int threads);
void rms_norm_backward(const float* dy, int64_t dy_row, const float* dh, int64_t dh_row, const float* h, int64_t h_row,
                       const float* weight, const float* rstd, float* dx, float* dweight, int64_t N, int64_t D,
                       int threads);

// x and y [N, H, Dr] by strides, y may be x; cos and sin [P, Dr/2].
int64_t rope(const float* x, int64_t x_token, int64_t x_head, const float* cos, const float* sin,
             const int64_t* positions, float* y, int64_t y_token, int64_t y_head, int64_t N, int64_t H, int64_t Dr,
             int64_t P, bool inverse, int threads);

// projection null: y is the table's row and R = D.
int64_t embedding_forward(const int64_t* ids, const float* table, int64_t table_row, const float* projection, float* y,
                          int64_t N, int64_t V, int64_t R, int64_t D, int threads);
void embedding_backward(const float* dy, int64_t dy_row, const int64_t* ids, const float* table, int64_t table_row,
                        const float* projection, float* dtable, float* dprojection, int64_t N, int64_t V, int64_t R,
                        int64_t D, int threads);

// Inputs by strides (token, head), a head of k_nope and v for each `shared` heads of the others; o [N, H, Dv]; tops [H,
// N], the highest score of each query, is what the backward pass needs. Returns whether cu_seqlens rises from 0 to N.
bool mla_attention_forward(const float* q_nope, int64_t qn_token, int64_t qn_head, const float* q_rope,
                           int64_t qr_token, int64_t qr_head, const float* k_nope, int64_t kn_token, int64_t kn_head,
                           const float* k_rope, int64_t kr_token, const float* v, int64_t v_token, int64_t v_head,
                           const int32_t* cu_seqlens, float scale, float* o, float* tops, int64_t N, int64_t H,
                           int64_t shared, int64_t Dn, int64_t Dr, int64_t Dv, int64_t S, int threads);
// Gradients contiguous; those of what is shared for each of the H heads, to be added up by the caller: dk_rope [H, N,
// Dr].
void mla_attention_backward(const float* d_o, int64_t do_token, int64_t do_head, const float* q_nope, int64_t qn_token,
                            int64_t qn_head, const float* q_rope, int64_t qr_token, int64_t qr_head,
                            const float* k_nope, int64_t kn_token, int64_t kn_head, const float* k_rope,
                            int64_t kr_token, const float* v, int64_t v_token, int64_t v_head,
                            const int32_t* cu_seqlens, float scale, const float* tops, float* dq_nope, float* dq_rope,
                            float* dk_nope, float* dk_rope, float* dv, int64_t N, int64_t H, int64_t shared, int64_t Dn,
                            int64_t Dr, int64_t Dv, int64_t S, int threads);

// Inputs by strides (sequence, head or token); up [H, Dn + Dv, R], o [B, H, Dv] contiguous. Returns how many lengths
// are outside 0..C.
int64_t mla_decode(const float* q_nope, int64_t qn_row, int64_t qn_head, const float* q_rope, int64_t qr_row,
                   int64_t qr_head, const float* latent, int64_t latent_row, int64_t latent_token, const float* k_rope,
                   int64_t rope_row, int64_t rope_token, const int64_t* lengths, const float* up, float scale, float* o,
                   int64_t B, int64_t C, int64_t H, int64_t R, int64_t Dn, int64_t Dr, int64_t Dv, int threads);

// order and offsets as `sort_slots` makes them.
void moe_route_forward(const float* logits, const float* bias, float* weights, int64_t* indices, int64_t* counts,
                       int32_t* order, int32_t* offsets, int64_t N, int64_t E, int64_t K, int64_t n_group,
                       int64_t topk_group, bool norm_topk_prob, bool softmax, float scaling, int threads);
// Sorts the slots (token, choice) by expert, stably: order [slots], and where each expert begins there, offsets [E +
// 1]. Returns how many indices are out of range; then order is not written.
int64_t sort_slots(const int64_t* indices, int64_t slots, int64_t E, int32_t* order, int32_t* offsets);
void moe_route_backward(const float* dweights, int64_t dweights_row, const float* logits, const int64_t* indices,
                        float* dlogits, int64_t N, int64_t E, int64_t K, bool norm_topk_prob, bool softmax,
                        float scaling, int threads);

// gate_up [2I, D], down [D, I]; gu [N, 2I] keeps x gate_up^T for the backward pass.
void swiglu_mlp_forward(const float* x, int64_t x_row, const float* gate_up, const float* down, float* y, float* gu,
                        int64_t N, int64_t D, int64_t I, int threads);
void swiglu_mlp_backward(const float* dy, int64_t dy_row, const float* x, int64_t x_row, const float* gate_up,
                         const float* down, const float* gu, float* dx, float* dgate_up, float* ddown, int64_t N,
                         int64_t D, int64_t I, int threads);

// gate_up [E, 2I, D], down [E, D, I]. order and offsets as `sort_slots` made them; gu [N K, 2I] is in that order.
// slots [N K, D] is working memory, used only where K > 1. Returns whether order and offsets are of these sizes; if
// not, nothing is written.
bool moe_experts_forward(const float* x, int64_t x_row, const float* weights, const int32_t* order,
                         const int32_t* offsets, const float* gate_up, const float* down, float* y, float* gu,
                         float* slots, int64_t N, int64_t D, int64_t K, int64_t E, int64_t I, int threads);
void moe_experts_backward(const float* dy, int64_t dy_row, const float* x, int64_t x_row, const float* weights,
                          const float* gate_up, const float* down, const float* gu, const int32_t* order,
                          const int32_t* offsets, float* dx, float* dweights, float* dgate_up, float* ddown,
                          float* slots, int64_t N, int64_t D, int64_t K, int64_t E, int64_t I, int threads);

// loss is one float; dhidden [N, R] and dweight [V, R] are written only if with_grads.
int64_t linear_cross_entropy(const float* hidden, int64_t hidden_row, const float* weight, const int64_t* labels,
                             int64_t ignore_index, float* loss, float* dhidden, float* dweight, int64_t N, int64_t R,
                             int64_t V, bool with_grads, int threads);

// Lists of `tensors` tensors; sizes in elements. correction1 = 1 - beta1^step, correction2 = 1 - beta2^step.
void adamw(float* const* params, const float* const* grads, float* const* exp_avgs, float* const* exp_avg_sqs,
           const int64_t* sizes, const double* lrs, const double* weight_decays, int64_t tensors, double beta1,
           double beta2, double eps, double correction1, double correction2, double clip_scale, int threads);
double grad_norm(const float* const* grads, const int64_t* sizes, int64_t tensors, int threads);

// shapes [stacks, 3]: n, rows, cols of matrices that lie one after the other in x and out; rows <= cols.
void newton_schulz(const float* x, float* out, const int64_t* shapes, int64_t stacks, float a, float b, float c,
                   float eps, int64_t iterations, int threads);
// Lists of `tensors` tensors, shapes [tensors, 3]: n, rows, cols; grads may be null. keep: of a parameter; rates
// [tensors]: of each one's direction.
void muon(float* const* params, const float* const* grads, float* const* momenta, const int64_t* shapes,
          const double* rates, int64_t tensors, double keep, double momentum, double clip_scale, float a, float b,
          float c, float eps, int64_t iterations, int threads);

// The weights as decode_step reads them: how many floats, which it writes to `memory` unless that is null.
int64_t decode_panels(const dsfast::Model* model, float* memory, int threads);
// N tokens, those of one row together and in order: token n, `ids[n]`, takes place `positions[n]` of row
// `token_rows[n]` in the cache, latent [layers, rows, capacity, R] and k_rope [layers, rows, capacity, Dr]. Every row
// must have a token. hidden [rows, head_width] is working memory. chosen [rows] is each row's next word: the likeliest,
// or, with `uniforms` [rows] in 0..1 (else null), the one sampled; then logits [rows, V] are written. Returned is the
// number of rows whose logits are not finite. Indices are checked by the caller. panels: from decode_panels.
int64_t decode_step(const dsfast::Model* model, float* panels, float* latent, float* k_rope, int64_t rows,
                    int64_t capacity, const int64_t* ids, const int64_t* token_rows, const int64_t* positions,
                    int64_t N, float* hidden, float* logits, const double* uniforms, double temperature,
                    int64_t* chosen, int threads);

// The mean loss of N tokens in S documents (cu_seqlens [S + 1] rises from 0 to N), and the gradients of all weights:
// `gradients` has an address in `shared` [size], which is written whole, for each weight of `model`. loads [layers, E]
// counts the tokens of each expert; seconds [2, parts] says where all threads together spent their time, forward and
// backward. Indices, labels (or ignore_index) and positions are checked by the caller.
float train_step(const dsfast::Model* model, const dsfast::Model* gradients, float* shared, int64_t size,
                 const int64_t* ids, const int64_t* labels, const int64_t* positions, const int32_t* cu_seqlens,
                 int64_t N, int64_t S, int64_t ignore_index, int64_t* loads, double* seconds, int threads);

}  // namespace DSFAST_ISA
