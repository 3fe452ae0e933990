// dsfast._native: binds the kernels of the best instruction set this processor has. Pointers cross as integers, checked
// before by dsfast/ops/, so nothing here depends on torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

#define DSFAST_ISA baseline
#include "kernels.h"
#undef DSFAST_ISA
#if defined(DSFAST_X86)
#define DSFAST_ISA avx2
#include "kernels.h"
#undef DSFAST_ISA
#define DSFAST_ISA avx512
#include "kernels.h"
#undef DSFAST_ISA
#define DSFAST_ISA avx2_bf16
#include "kernels.h"
#undef DSFAST_ISA
#define DSFAST_ISA avx512_bf16
#include "kernels.h"
#undef DSFAST_ISA
#endif

namespace py = pybind11;

namespace {

// What a C++ argument is on the Python side: a pointer is an integer, all else is itself.
template <class T>
struct Wire {
  using type = T;
};
template <class T>
struct Wire<T*> {
  using type = uintptr_t;
};

template <class T>
T from_wire(typename Wire<T>::type x) {
  if constexpr (std::is_pointer_v<T>)
    return reinterpret_cast<T>(x);
  else
    return x;
}

template <class R, class... A>
void bind(py::module_& m, const char* name, R (*kernel)(A...)) {
  m.def(name, [kernel](typename Wire<A>::type... arguments) {
    py::gil_scoped_release release;
    return kernel(from_wire<A>(arguments)...);
  });
}

using Pointers = std::vector<uintptr_t>;
template <class T>
T* const* pointers(const Pointers& list) {
  return reinterpret_cast<T* const*>(list.data());
}

template <class AdamW, class GradNorm>
void bind_lists(py::module_& m, AdamW adamw, GradNorm grad_norm) {
  m.def("adamw", [adamw](const Pointers& params, const Pointers& grads, const Pointers& exp_avgs,
                         const Pointers& exp_avg_sqs, const std::vector<int64_t>& sizes, const std::vector<double>& lrs,
                         const std::vector<double>& weight_decays, double beta1, double beta2, double eps,
                         double correction1, double correction2, double clip_scale, int threads) {
    py::gil_scoped_release release;
    adamw(pointers<float>(params), pointers<const float>(grads), pointers<float>(exp_avgs),
          pointers<float>(exp_avg_sqs), sizes.data(), lrs.data(), weight_decays.data(), int64_t(sizes.size()), beta1,
          beta2, eps, correction1, correction2, clip_scale, threads);
  });
  m.def("grad_norm", [grad_norm](const Pointers& grads, const std::vector<int64_t>& sizes, int threads) {
    py::gil_scoped_release release;
    return grad_norm(pointers<const float>(grads), sizes.data(), int64_t(sizes.size()), threads);
  });
}

template <class Muon>
void bind_muon(py::module_& m, Muon muon) {
  m.def("muon",
        [muon](const Pointers& params, const Pointers& grads, const Pointers& momenta,
               const std::vector<int64_t>& shapes, const std::vector<double>& rates, double keep, double momentum,
               double clip_scale, float a, float b, float c, float eps, int64_t iterations, int threads) {
          py::gil_scoped_release release;
          muon(pointers<float>(params), pointers<const float>(grads), pointers<float>(momenta), shapes.data(),
               rates.data(), int64_t(rates.size()), keep, momentum, clip_scale, a, b, c, eps, iterations, threads);
        });
}

// An attribute to be set from Python; a pointer is an integer there.
template <class C, class B, class T>
void field(py::class_<C>& type, const char* name, T B::* member) {
  type.def_property(name, nullptr, [member](C& x, typename Wire<T>::type value) { x.*member = from_wire<T>(value); });
}

// A model for `decode_step` and `train_step`: the struct, and the layers it points to.
struct LayeredModel : dsfast::Model {
  std::vector<dsfast::Layer> kept;
  LayeredModel() : dsfast::Model{} {}
  void add_layer(const dsfast::Layer& layer) {
    kept.push_back(layer);
    layers = kept.data();
    layer_count = int64_t(kept.size());
  }
  uintptr_t address() const { return reinterpret_cast<uintptr_t>(static_cast<const dsfast::Model*>(this)); }
};

void bind_layer(py::module_& m) {
  using dsfast::Layer;
  py::class_<Layer> layer(m, "Layer");
  layer.def(py::init([] { return Layer{}; }));
  field(layer, "input_norm", &Layer::input_norm);
  field(layer, "mlp_norm", &Layer::mlp_norm);
  field(layer, "q_a", &Layer::q_a);
  field(layer, "q_a_norm", &Layer::q_a_norm);
  field(layer, "q", &Layer::q);
  field(layer, "kv_a", &Layer::kv_a);
  field(layer, "kv_a_norm", &Layer::kv_a_norm);
  field(layer, "kv_b", &Layer::kv_b);
  field(layer, "o", &Layer::o);
  field(layer, "router", &Layer::router);
  field(layer, "router_bias", &Layer::router_bias);
  field(layer, "experts_gate_up", &Layer::experts_gate_up);
  field(layer, "experts_down", &Layer::experts_down);
  field(layer, "gate_up", &Layer::gate_up);
  field(layer, "down", &Layer::down);
  field(layer, "width", &Layer::width);
}

void bind_model(py::module_& m) {
  py::class_<LayeredModel> model(m, "Model");
  model.def(py::init<>());
  model.def("add_layer", &LayeredModel::add_layer);
  model.def_property_readonly("address", &LayeredModel::address);
  field(model, "vocabulary", &LayeredModel::vocabulary);
  field(model, "width", &LayeredModel::width);
  field(model, "heads", &LayeredModel::heads);
  field(model, "latent_rank", &LayeredModel::latent_rank);
  field(model, "query_rank", &LayeredModel::query_rank);
  field(model, "nope", &LayeredModel::nope);
  field(model, "rope", &LayeredModel::rope);
  field(model, "value", &LayeredModel::value);
  field(model, "experts", &LayeredModel::experts);
  field(model, "chosen", &LayeredModel::chosen);
  field(model, "groups", &LayeredModel::groups);
  field(model, "chosen_groups", &LayeredModel::chosen_groups);
  field(model, "expert_width", &LayeredModel::expert_width);
  field(model, "norm_topk_prob", &LayeredModel::norm_topk_prob);
  field(model, "softmax_scores", &LayeredModel::softmax_scores);
  field(model, "routed_scaling", &LayeredModel::routed_scaling);
  field(model, "softmax_scale", &LayeredModel::softmax_scale);
  field(model, "eps", &LayeredModel::eps);
  field(model, "latent_eps", &LayeredModel::latent_eps);
  field(model, "cos", &LayeredModel::cos);
  field(model, "sin", &LayeredModel::sin);
  field(model, "table", &LayeredModel::table);
  field(model, "projection", &LayeredModel::projection);
  field(model, "embedding_rank", &LayeredModel::embedding_rank);
  field(model, "norm", &LayeredModel::norm);
  field(model, "head_projection", &LayeredModel::head_projection);
  field(model, "head", &LayeredModel::head);
  field(model, "head_width", &LayeredModel::head_width);
}

// What is made of matrix products.
#define DSFAST_BIND_PRODUCTS(m, ISA)                                \
  do {                                                              \
    bind(m, "embedding_forward", ISA::embedding_forward);           \
    bind(m, "embedding_backward", ISA::embedding_backward);         \
    bind(m, "mla_attention_forward", ISA::mla_attention_forward);   \
    bind(m, "mla_attention_backward", ISA::mla_attention_backward); \
    bind(m, "swiglu_mlp_forward", ISA::swiglu_mlp_forward);         \
    bind(m, "swiglu_mlp_backward", ISA::swiglu_mlp_backward);       \
    bind(m, "moe_experts_forward", ISA::moe_experts_forward);       \
    bind(m, "moe_experts_backward", ISA::moe_experts_backward);     \
    bind(m, "linear_cross_entropy", ISA::linear_cross_entropy);     \
    bind(m, "newton_schulz", ISA::newton_schulz);                   \
    bind_muon(m, ISA::muon);                                        \
    bind(m, "train_step", ISA::train_step);                         \
  } while (false)

#define DSFAST_BIND_ALL(m, ISA)                             \
  do {                                                      \
    DSFAST_BIND_PRODUCTS(m, ISA);                           \
    bind(m, "rms_norm_forward", ISA::rms_norm_forward);     \
    bind(m, "rms_norm_backward", ISA::rms_norm_backward);   \
    bind(m, "rope", ISA::rope);                             \
    bind(m, "mla_decode", ISA::mla_decode);                 \
    bind(m, "moe_route_forward", ISA::moe_route_forward);   \
    bind(m, "moe_route_backward", ISA::moe_route_backward); \
    bind(m, "sort_slots", ISA::sort_slots);                 \
    bind(m, "decode_panels", ISA::decode_panels);           \
    bind(m, "decode_step", ISA::decode_step);               \
    bind_lists(m, ISA::adamw, ISA::grad_norm);              \
  } while (false)

// Every feature an instruction set's flags use is asked for by itself.
std::vector<std::string> supported() {
  std::vector<std::string> names = {"baseline"};
#if defined(DSFAST_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2) names.push_back("avx2");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    names.push_back("avx512");
    if (__builtin_cpu_supports("avx512bf16")) names.push_back("avx512_bf16");
  }
#endif
  return names;
}

std::string chosen(const std::vector<std::string>& names) {
  const char* wanted = std::getenv("DSFAST_ISA");
  if (wanted == nullptr || *wanted == '\0') return names.back();
  std::string known;
  for (const auto& name : names) {
    if (name == wanted) return name;
    known += (known.empty() ? "" : ", ") + name;
  }
  throw py::import_error("environment variable DSFAST_ISA is '" + std::string(wanted) +
                         "'; this processor runs: " + known);
}

// Freed activations stay with the process: given back, each step would fault its pages in again.
bool keep_freed_memory() {
#if defined(__GLIBC__)
  return mallopt(M_MMAP_THRESHOLD, 32 << 20) == 1 && mallopt(M_TRIM_THRESHOLD, 1 << 30) == 1;  // 32 MiB: glibc's limit
#else
  return false;
#endif
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  const std::vector<std::string> names = supported();
  const std::string isa = chosen(names);
  m.attr("source_hash") = DSFAST_SOURCE_HASH;
  m.attr("isa") = isa;
  m.attr("supported") = names;
  m.def("keep_freed_memory", &keep_freed_memory);
  bind_layer(m);
  bind_model(m);
#if defined(DSFAST_X86)
  m.attr("compiled") = std::vector<std::string>{"baseline", "avx2", "avx512", "avx512_bf16"};
  if (isa == "avx512" || isa == "avx512_bf16")
    DSFAST_BIND_ALL(m, avx512);
  else if (isa == "avx2")
    DSFAST_BIND_ALL(m, avx2);
  else
    DSFAST_BIND_ALL(m, baseline);
  // The same with products of bfloat16: by the processor's instruction, or emulated.
  m.attr("fast_bfloat16") = isa == "avx512_bf16" && __builtin_cpu_is("amd");
  if (isa != "baseline") {
    py::module_ bfloat16 = m.def_submodule("bfloat16");
    if (isa == "avx512_bf16")
      DSFAST_BIND_PRODUCTS(bfloat16, avx512_bf16);
    else
      DSFAST_BIND_PRODUCTS(bfloat16, avx2_bf16);
  }
#else
  m.attr("compiled") = std::vector<std::string>{"baseline"};
  m.attr("fast_bfloat16") = false;
  DSFAST_BIND_ALL(m, baseline);
#endif
}
