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

#define DSFAST_BIND_ALL(ISA)                                        \
  do {                                                              \
    bind(m, "rms_norm_forward", ISA::rms_norm_forward);             \
    bind(m, "rms_norm_backward", ISA::rms_norm_backward);           \
    bind(m, "rope", ISA::rope);                                     \
    bind(m, "embedding_forward", ISA::embedding_forward);           \
    bind(m, "embedding_backward", ISA::embedding_backward);         \
    bind(m, "mla_attention_forward", ISA::mla_attention_forward);   \
    bind(m, "mla_attention_backward", ISA::mla_attention_backward); \
    bind(m, "moe_route_forward", ISA::moe_route_forward);           \
    bind(m, "moe_route_backward", ISA::moe_route_backward);         \
    bind(m, "swiglu_mlp_forward", ISA::swiglu_mlp_forward);         \
    bind(m, "swiglu_mlp_backward", ISA::swiglu_mlp_backward);       \
    bind(m, "moe_experts_forward", ISA::moe_experts_forward);       \
    bind(m, "moe_experts_backward", ISA::moe_experts_backward);     \
    bind(m, "linear_cross_entropy", ISA::linear_cross_entropy);     \
    bind_lists(m, ISA::adamw, ISA::grad_norm);                      \
  } while (false)

// Every feature an instruction set's flags use is asked for by itself.
std::vector<std::string> supported() {
  std::vector<std::string> names = {"baseline"};
#if defined(DSFAST_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2) names.push_back("avx2");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    names.push_back("avx512");
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
#if defined(DSFAST_X86)
  m.attr("compiled") = std::vector<std::string>{"baseline", "avx2", "avx512"};
  if (isa == "avx512")
    DSFAST_BIND_ALL(avx512);
  else if (isa == "avx2")
    DSFAST_BIND_ALL(avx2);
  else
    DSFAST_BIND_ALL(baseline);
#else
  m.attr("compiled") = std::vector<std::string>{"baseline"};
  DSFAST_BIND_ALL(baseline);
#endif
}
