// One vector of floats, W lanes, for the level this file is compiled for, and exp.
//
// Included by one translation unit a level, each with its own instruction set. All is static in a namespace of its own
// and uses no std template: an inline function shared between the units could be linked in the wrong level's version.
#pragma once
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(ACTSCALE_AVX2) || defined(ACTSCALE_AVX512)
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

#include "../calls.h"

namespace actscale {
namespace ACTSCALE_LEVEL {

#if defined(__clang__)
#define UNROLL_LOOPS _Pragma("unroll")
#else
#define UNROLL_LOOPS _Pragma("GCC unroll 16")
#endif
#define INLINE_MEMBER inline __attribute__((always_inline))
#define INLINE static INLINE_MEMBER

struct bf16 {
    uint16_t bits;
};
struct half {
    uint16_t bits;
};

INLINE float bits_to_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
INLINE uint32_t float_to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

// One value at a time; both roundings are to nearest even.
INLINE float widen(float value) { return value; }
INLINE float widen(bf16 value) { return bits_to_float(uint32_t(value.bits) << 16); }
INLINE float widen(half value) {
    const uint32_t sign = uint32_t(value.bits & 0x8000) << 16, magnitude = value.bits & 0x7fff;
    if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (magnitude << 13));  // inf, NaN
    // A subnormal is an integer multiple of 2^-24; a normal one needs its exponent moved from bias 15 to 127.
    const float normal = bits_to_float((magnitude << 13) + (112u << 23));
    const float absolute = magnitude < 0x400 ? float(magnitude) * 0x1p-24f : normal;
    return bits_to_float(sign | float_to_bits(absolute));
}
INLINE void narrow(float value, float* out) { *out = value; }
INLINE void narrow(float value, bf16* out) {
    const uint32_t bits = float_to_bits(value);
    out->bits = uint16_t(value != value ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
INLINE void narrow(float value, half* out) {
    const uint32_t bits = float_to_bits(value), sign = (bits >> 16) & 0x8000, absolute = bits & 0x7fffffff;
    uint32_t result;
    if (absolute > 0x7f800000) result = 0x7e00;        // NaN
    else if (absolute >= 0x477ff000) result = 0x7c00;  // rounds to inf
    else if (absolute < 0x38800000)                    // subnormal: the adder rounds
        result = float_to_bits(bits_to_float(absolute) + 0.5f) - float_to_bits(0.5f);
    else result = (absolute + 0xfff + ((absolute >> 13) & 1) - (112u << 23)) >> 13;
    out->bits = uint16_t(sign | result);
}

#if defined(ACTSCALE_AVX512)
typedef __m512 F;
typedef __mmask16 Mask;
constexpr int W = 16;
INLINE F set1(float v) { return _mm512_set1_ps(v); }
INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
INLINE F load(const bf16* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
INLINE F load(const half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
INLINE void store(float* p, F v) { _mm512_storeu_ps(p, v); }
INLINE __m256i pack(F v, bf16*) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}
INLINE __m256i pack(F v, half*) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
template <class T> INLINE void store(T* p, F v) { _mm256_storeu_si256((__m256i*)p, pack(v, p)); }
INLINE void stream(float* p, F v) { _mm512_stream_ps(p, v); }
template <class T> INLINE void stream(T* p, F v) { _mm256_stream_si256((__m256i*)p, pack(v, p)); }
INLINE void fence() { _mm_sfence(); }
INLINE F fmadd(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
INLINE F larger(F a, F b) { return _mm512_max_ps(a, b); }
INLINE F lesser(F a, F b) { return _mm512_min_ps(a, b); }
INLINE F times_power_of_two(F v, F n) { return _mm512_scalef_ps(v, n); }
INLINE Mask not_below(F v, F bound) { return _mm512_cmp_ps_mask(v, bound, _CMP_NLT_UQ); }
INLINE F keep(Mask mask, F v) { return _mm512_maskz_mov_ps(mask, v); }
INLINE F absolute(F v) { return _mm512_abs_ps(v); }
INLINE F square_root(F v) { return _mm512_sqrt_ps(v); }

#elif defined(ACTSCALE_AVX2)
typedef __m256 F;
typedef __m256 Mask;
constexpr int W = 8;
INLINE F set1(float v) { return _mm256_set1_ps(v); }
INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
INLINE F load(const bf16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
INLINE F load(const half* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
INLINE void store(float* p, F v) { _mm256_storeu_ps(p, v); }
INLINE __m128i pack(F v, bf16*) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    rounded = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}
INLINE __m128i pack(F v, half*) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
template <class T> INLINE void store(T* p, F v) { _mm_storeu_si128((__m128i*)p, pack(v, p)); }
INLINE void stream(float* p, F v) { _mm256_stream_ps(p, v); }
template <class T> INLINE void stream(T* p, F v) { _mm_stream_si128((__m128i*)p, pack(v, p)); }
INLINE void fence() { _mm_sfence(); }
INLINE F fmadd(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
INLINE F larger(F a, F b) { return _mm256_max_ps(a, b); }
INLINE F lesser(F a, F b) { return _mm256_min_ps(a, b); }
INLINE F times_power_of_two(F v, F shifted) {
    return v * _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(shifted), 23));
}
INLINE Mask not_below(F v, F bound) { return _mm256_cmp_ps(v, bound, _CMP_NLT_UQ); }
INLINE F keep(Mask mask, F v) { return _mm256_and_ps(mask, v); }
INLINE F absolute(F v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }
INLINE F square_root(F v) { return _mm256_sqrt_ps(v); }

#else  // SSE2, NEON or whatever the compiler makes of 16-byte vectors
typedef float F __attribute__((vector_size(16)));
typedef int32_t Mask __attribute__((vector_size(16)));
constexpr int W = 4;
INLINE F set1(float v) { return F{v, v, v, v}; }
INLINE F load(const float* p) {
    F v;
    memcpy(&v, p, sizeof v);
    return v;
}
template <class T> INLINE F load(const T* p) { return F{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])}; }
INLINE void store(float* p, F v) { memcpy(p, &v, sizeof v); }
template <class T> INLINE void store(T* p, F v) {
    for (int i = 0; i < W; i++) narrow(v[i], p + i);
}
template <class T> INLINE void stream(T* p, F v) { store(p, v); }
INLINE void fence() {}
INLINE F fmadd(F a, F b, F c) { return a * b + c; }
INLINE F choose(Mask mask, F a, F b) { return F((mask & Mask(a)) | (~mask & Mask(b))); }
INLINE F larger(F a, F b) { return choose(a > b, a, b); }
INLINE F lesser(F a, F b) { return choose(a < b, a, b); }
INLINE F times_power_of_two(F v, F shifted) { return v * F(Mask(shifted) << 23); }
INLINE Mask not_below(F v, F bound) { return ~(v < bound); }
INLINE F keep(Mask mask, F v) { return F(mask & Mask(v)); }
INLINE F absolute(F v) { return F(Mask(v) & 0x7fffffff); }
INLINE F square_root(F v) { return F{sqrtf(v[0]), sqrtf(v[1]), sqrtf(v[2]), sqrtf(v[3])}; }
#endif

// The first `count` lanes from memory, the others `fill`; the first `count` lanes to memory.
template <class T> INLINE F load_part(const T* p, int count, float fill) {
    float lanes[W];
    for (int i = 0; i < W; i++) lanes[i] = fill;
    for (int i = 0; i < count; i++) lanes[i] = widen(p[i]);
    return load(lanes);
}
template <class T> INLINE void store_part(T* p, F v, int count) {
    float lanes[W];
    store(lanes, v);
    for (int i = 0; i < count; i++) narrow(lanes[i], p + i);
}

// Halves added to halves: the same order every time.
INLINE float sum_of(F v) {
#if defined(ACTSCALE_AVX512)
    return _mm512_reduce_add_ps(v);
#elif defined(ACTSCALE_AVX2)
    const __m128 four = _mm256_castps256_ps128(v) + _mm256_extractf128_ps(v, 1);
    const __m128 two = four + _mm_movehl_ps(four, four);
    return _mm_cvtss_f32(two + _mm_shuffle_ps(two, two, 1));
#else
    return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}
INLINE float largest_of(F v) {
    float lanes[W], result = -FLT_MAX;  // never -inf: the difference to it must be -inf, not NaN
    store(lanes, v);
    for (int i = 0; i < W; i++) result = lanes[i] > result ? lanes[i] : result;
    return result;
}

// x = n + f, n = x rounded, |f| <= 1/2; `power`: what times_power_of_two takes for n.
struct Split {
    F f, power;
};
INLINE Split split(F x) {
#if defined(ACTSCALE_AVX512)
    const F f = _mm512_reduce_ps(x, 0);  // f of -inf is 0
    return {f, x - f};
#else
    const F magic = set1(0x1.8p23f + 127), shifted = x + magic;  // its lowest bits are n + 127
    return {x - (shifted - magic), shifted};
#endif
}

// (2^f - 1)/f, |f| <= 1/2: 1 + f times it is the minimax polynomial of degree 6 of 2^f that is 1 at 0 (relative error
// 4e-9).
INLINE F slope_of_power(F f) {
    F q = fmadd(set1(0x1.446c7ep-13f), f, set1(0x1.5f88fep-10f));
    q = fmadd(q, f, set1(0x1.3b29e4p-7f));
    q = fmadd(q, f, set1(0x1.c6ae2cp-5f));
    q = fmadd(q, f, set1(0x1.ebfbe0p-3f));
    return fmadd(q, f, set1(0x1.62e432p-1f));
}

// 2^x, at most 1.5 ulp off; below 2^-126 the subnormal number, or without AVX-512 one up to 2^-126.5 and then 0;
// infinite from x = 128 on; NaN stays NaN.
INLINE F exponential2(F x) {
#if !defined(ACTSCALE_AVX512)
    x = larger(set1(-127.0f), lesser(set1(128.0f), x));  // the powers that a float's exponent has bits for
#endif
    const Split s = split(x);
    return times_power_of_two(fmadd(slope_of_power(s.f), s.f, set1(1.0f)), s.power);
}

// Calls `run` with a zero of the C++ type that `type` names.
template <class Run> INLINE void with_type(Type type, Run run) {
    if (type == Type::float32) run(float());
    else if (type == Type::bfloat16) run(bf16());
    else run(half());
}

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int thread_index() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

}  // namespace ACTSCALE_LEVEL
}  // namespace actscale
