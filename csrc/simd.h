// Vectors of W floats in the compiler's own vector extension: one source for every instruction set.
// Only free functions and no std:: templates: a template from a header shared between instruction sets could be
// merged by the linker into the copy that an older processor cannot run.
#pragma once
#include <cstdint>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define DSFAST_INLINE inline __attribute__((always_inline))

namespace DSFAST_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vfloat __attribute__((vector_size(4 * W)));
typedef int32_t vint __attribute__((vector_size(4 * W)));
typedef float vfloat_unaligned __attribute__((vector_size(4 * W), aligned(4), may_alias));

DSFAST_INLINE vfloat load(const float* p) { return *reinterpret_cast<const vfloat_unaligned*>(p); }
DSFAST_INLINE void store(float* p, vfloat x) { *reinterpret_cast<vfloat_unaligned*>(p) = x; }
// Not 0 + x: that turns -0 into 0, so it stays an addition.
DSFAST_INLINE vfloat splat(float x) { return x - vfloat{}; }
// The same four floats in every four lanes.
#if defined(__AVX512F__)
DSFAST_INLINE vfloat repeat_four(const float* p) { return _mm512_broadcast_f32x4(_mm_loadu_ps(p)); }
#elif defined(__AVX2__)
DSFAST_INLINE vfloat repeat_four(const float* p) { return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p)); }
#else
DSFAST_INLINE vfloat repeat_four(const float* p) { return load(p); }
#endif
// Where one operand is NaN the result is the second operand. `a > b ? a : b` says the same, but GCC makes two
// instructions of it.
#if defined(__AVX512F__)
DSFAST_INLINE vfloat maximum(vfloat a, vfloat b) { return _mm512_max_ps(a, b); }
DSFAST_INLINE vfloat minimum(vfloat a, vfloat b) { return _mm512_min_ps(a, b); }
#elif defined(__AVX2__)
DSFAST_INLINE vfloat maximum(vfloat a, vfloat b) { return _mm256_max_ps(a, b); }
DSFAST_INLINE vfloat minimum(vfloat a, vfloat b) { return _mm256_min_ps(a, b); }
#else
DSFAST_INLINE vfloat maximum(vfloat a, vfloat b) { return a > b ? a : b; }
DSFAST_INLINE vfloat minimum(vfloat a, vfloat b) { return a < b ? a : b; }
#endif
// Whether a comparison holds in any lane.
#if defined(__AVX512F__)
DSFAST_INLINE bool any(vint holds) { return _mm512_test_epi32_mask((__m512i)holds, (__m512i)holds) != 0; }
#elif defined(__AVX2__)
DSFAST_INLINE bool any(vint holds) { return _mm256_testz_si256((__m256i)holds, (__m256i)holds) == 0; }
#else
DSFAST_INLINE bool any(vint holds) {
  int32_t found = 0;
  for (int i = 0; i < W; ++i) found |= holds[i];
  return found != 0;
}
#endif

// The first `count` (< W) floats; the other lanes are zero.
#if defined(__AVX512F__)
DSFAST_INLINE vfloat load_part(const float* p, int64_t count) {
  return _mm512_maskz_loadu_ps(__mmask16((1 << count) - 1), p);
}
DSFAST_INLINE void store_part(float* p, vfloat x, int64_t count) {
  _mm512_mask_storeu_ps(p, __mmask16((1 << count) - 1), x);
}
#else
DSFAST_INLINE vfloat load_part(const float* p, int64_t count) {
#if defined(__AVX2__)
  return _mm256_maskload_ps(p, (__m256i)(vint{0, 1, 2, 3, 4, 5, 6, 7} < int32_t(count)));
#else
  vfloat x = {};
  for (int64_t i = 0; i < count; ++i) x[i] = p[i];
  return x;
#endif
}
DSFAST_INLINE void store_part(float* p, vfloat x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] = x[i];
}
#endif
DSFAST_INLINE float sum(vfloat x) {
  float total = 0;
  for (int i = 0; i < W; ++i) total += x[i];
  return total;
}

// exp(x), at most 2 units in the last place off for -87.3 <= x <= 88.3; below it is 0, above it exp(88.3), of NaN it is
// NaN. x = n ln 2 + r, |r| <= ln 2 / 2; ln 2 in two parts so that r is exact; exp(r) = 1 + r + r^2 q(r), q of degree 4
// fitted for the least relative error (3e-9), in pairs: a chain of seven multiply-adds would wait for each of them.
DSFAST_INLINE vfloat exp(vfloat x) {
  const vfloat clamped = minimum(splat(88.3f), maximum(splat(-87.3f), x));  // the second operand's NaN stays
  // 1.5 * 2^23 + 127: the low bits of the sum are round(x / ln 2) + 127, the exponent field of 2^n.
  const vfloat shifted = clamped * 1.44269504f + 12583039.0f;
  const vfloat n = shifted - 12583039.0f;
  const vfloat r = (clamped - n * 0.693145752f) - n * 1.42860677e-6f;
  const vfloat r2 = r * r;
  const vfloat high = r2 * 1.381461326e-3f + (r * 8.368709824e-3f + 4.166838736e-2f);
  const vfloat q = r2 * high + (r * 0.1666652069f + 0.4999999345f);
  const vfloat power = (vfloat)((vint)shifted << 23);
  const vfloat result = power * (r2 * q + r) + power;
  return (vfloat)((vint)result & ~(x < -87.3f));
}

// 2^x for -126 <= x <= 127; below it next to nothing or 0, above it inf or some number beyond 1e38, of NaN it is NaN.
// x = n + r, |r| <= 1 / 2; 2^r by a polynomial fitted for the least relative error. Fewer instructions than exp, where
// an argument in base 2 costs nothing. DEGREE 4 (1 + r p(r)): at most 3 units in the last place off; 3: by 1.1e-4, for
// what is then rounded to bfloat16, by up to 4e-3; a sum of them is off as much.
template <int DEGREE>
DSFAST_INLINE vfloat exp2(vfloat x) {
#if defined(__AVX512F__)
  const vfloat r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEAREST_INT);
  const vfloat n = x - r;
#else
  const vfloat clamped = minimum(splat(127.0f), maximum(splat(-126.0f), x));
  const vfloat shifted = clamped + 12583039.0f;  // as in exp
  const vfloat r = clamped - (shifted - 12583039.0f);
#endif
  vfloat power_of_r;
  if constexpr (DEGREE == 3) {
    power_of_r = ((r * 5.500894028e-2f + 2.422109604e-1f) * r + 6.93282925e-1f) * r + 1.0f;
  } else {
    static_assert(DEGREE == 4, "coefficients are here for degrees 3 and 4");
    const vfloat r2 = r * r;
    const vfloat high = r2 * (r * 1.326472731e-3f + 9.671512991e-3f) + (r * 5.550733581e-2f + 2.402224243e-1f);
    power_of_r = r2 * high + (r * 6.931470037e-1f + 1.0f);
  }
#if defined(__AVX512F__)
  return _mm512_scalef_ps(power_of_r, n);
#else
  return power_of_r * (vfloat)((vint)shifted << 23);
#endif
}

DSFAST_INLINE vfloat sigmoid(vfloat x) { return 1.0f / (1.0f + exp(-x)); }

// f(i, n) for the numbers i .. i + n - 1 of 0 .. count - 1: W at a time, then the rest.
template <class F>
DSFAST_INLINE void for_vectors(int64_t count, F f) {
  int64_t i = 0;
  for (; i + W <= count; i += W) f(i, int64_t(W));
  if (i < count) f(i, count - i);
}
DSFAST_INLINE vfloat load_n(const float* p, int64_t n) { return n == W ? load(p) : load_part(p, n); }
DSFAST_INLINE void store_n(float* p, vfloat x, int64_t n) { n == W ? store(p, x) : store_part(p, x, n); }

// y = silu(gate) * up
DSFAST_INLINE void swiglu(const float* gate, const float* up, float* y, int64_t size) {
  for_vectors(size, [&](int64_t i, int64_t n) {
    const vfloat x = load_n(gate + i, n);
    store_n(y + i, x * sigmoid(x) * load_n(up + i, n), n);
  });
}

DSFAST_INLINE void clear(float* x, int64_t size) {
  for_vectors(size, [&](int64_t i, int64_t n) { store_n(x + i, vfloat{}, n); });
}

DSFAST_INLINE void copy(const float* x, float* to, int64_t size) {
  for_vectors(size, [&](int64_t i, int64_t n) { store_n(to + i, load_n(x + i, n), n); });
}

// to += x
DSFAST_INLINE void add(const float* x, float* to, int64_t size) {
  for_vectors(size, [&](int64_t i, int64_t n) { store_n(to + i, load_n(to + i, n) + load_n(x + i, n), n); });
}

DSFAST_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
DSFAST_INLINE int64_t largest(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace DSFAST_ISA
