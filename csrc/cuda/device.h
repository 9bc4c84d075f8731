// What the CUDA kernels use of the device, in one place: 16-byte vectors, conversions, asynchronous copies, clusters.
// With ACTSCALE_EMULATE_CUDA another header stands in for the hardware and the same kernels run on a CPU in the tests.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"

namespace actscale {
namespace cuda {

struct float32 {
    uint32_t bits;
};
struct bf16 {
    uint16_t bits;
};
struct half16 {
    uint16_t bits;
};

struct alignas(16) Vector {
    uint32_t word[4];
};

}  // namespace cuda
}  // namespace actscale

#ifdef ACTSCALE_EMULATE_CUDA
#include "emulated_cuda.h"
#define DEVICE inline
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define DEVICE __device__ __forceinline__
#endif

namespace actscale {
namespace cuda {

template <class T> constexpr int WIDTH = 16 / sizeof(T);  // elements of a vector

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

// INFINITY by its bits: the host's macro is no constant of the device.
DEVICE float bits_to_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
DEVICE uint32_t float_to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}
DEVICE float minus_infinity() { return bits_to_float(0xff800000); }
DEVICE float infinity() { return bits_to_float(0x7f800000); }
DEVICE float not_a_number() { return bits_to_float(0x7fc00000); }
DEVICE float32 minus_infinity(float32) { return {0xff800000}; }
DEVICE bf16 minus_infinity(bf16) { return {0xff80}; }
DEVICE half16 minus_infinity(half16) { return {0xfc00}; }

#ifndef ACTSCALE_EMULATE_CUDA
// 2^x to 2 ulp, a result below the normal numbers is 0; exp2f would spend two more instructions on those.
DEVICE float exp2_approximate(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// To 1 ulp.
DEVICE float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// A product that is rounded before anything is added to it: the compiler may not contract it into a sum.
DEVICE float rounded_product(float a, float b) { return __fmul_rn(a, b); }

DEVICE float half_value(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
DEVICE uint16_t half_bits(float value) { return __half_as_ushort(__float2half_rn(value)); }
DEVICE uint16_t bf16_bits(float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }
DEVICE uint32_t pair_bits(float low, float high, half16) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
DEVICE uint32_t pair_bits(float low, float high, bf16) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// The larger of each half; NaN only where both are.
DEVICE uint32_t pair_max(uint32_t a, uint32_t b, half16) {
    uint32_t pair;
    asm("max.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
    return pair;
}
DEVICE uint32_t pair_max(uint32_t a, uint32_t b, bf16) {
    uint32_t pair;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
    return pair;
}

DEVICE char* dynamic_shared() {
    extern __shared__ Vector actscale_shared[];
    return reinterpret_cast<char*>(actscale_shared);
}

// 16 bytes from global to shared memory, both on 16-byte boundaries; visible to this thread after the wait.
DEVICE void copy_async(Vector* shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(uint32_t(__cvta_generic_to_shared(shared))),
                 "l"(global)
                 : "memory");
}
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> DEVICE void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// A kernel that is launched without clusters never calls these; sm_80 has none.
DEVICE void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
    __cluster_barrier_arrive();
#endif
}
DEVICE void cluster_wait() {
#if __CUDA_ARCH__ >= 900
    __cluster_barrier_wait();
#endif
}
// The same place in the shared memory of the cluster's block `rank`.
template <class T> DEVICE const T* in_block(const T* shared, int rank) {
#if __CUDA_ARCH__ >= 900
    return static_cast<const T*>(__cluster_map_shared_rank(shared, rank));
#else
    return shared;
#endif
}
#endif

// A vector of -inf.
template <class T> DEVICE Vector nothing(T) {
    const uint32_t bits = minus_infinity(T()).bits, word = sizeof(T) == 2 ? bits | bits << 16 : bits;
    return {{word, word, word, word}};
}

DEVICE float widen(float32 value) { return bits_to_float(value.bits); }
DEVICE float widen(bf16 value) { return bits_to_float(uint32_t(value.bits) << 16); }
DEVICE float widen(half16 value) { return half_value(value.bits); }
DEVICE void narrow(float value, float32* out) { out->bits = float_to_bits(value); }
DEVICE void narrow(float value, bf16* out) { out->bits = bf16_bits(value); }
DEVICE void narrow(float value, half16* out) { out->bits = half_bits(value); }

// A vector's elements as floats and back, in registers.
DEVICE void unpack(const Vector& v, float (&out)[4], float32) {
#pragma unroll
    for (int i = 0; i < 4; i++) out[i] = bits_to_float(v.word[i]);
}
template <class T> DEVICE void unpack(const Vector& v, float (&out)[8], T) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        out[2 * i] = widen(T{uint16_t(v.word[i])});
        out[2 * i + 1] = widen(T{uint16_t(v.word[i] >> 16)});
    }
}
DEVICE Vector pack(const float (&in)[4], float32) {
    Vector v;
#pragma unroll
    for (int i = 0; i < 4; i++) v.word[i] = float_to_bits(in[i]);
    return v;
}
template <class T> DEVICE Vector pack(const float (&in)[8], T) {
    Vector v;
#pragma unroll
    for (int i = 0; i < 4; i++) v.word[i] = pair_bits(in[2 * i], in[2 * i + 1], T());
    return v;
}

// Sums and maxima over a warp; a butterfly, so every lane gets the same bits.
DEVICE float warp_max(float value) {
#pragma unroll
    for (int mask = 16; mask; mask /= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, mask));
    return value;
}
DEVICE float warp_sum(float value) {
#pragma unroll
    for (int mask = 16; mask; mask /= 2) value += __shfl_xor_sync(0xffffffffu, value, mask);
    return value;
}

// Elements from the last 16-byte boundary to `p`.
template <class T> DEVICE int off_grid(const T* p) { return int(reinterpret_cast<uintptr_t>(p) % 16 / sizeof(T)); }

}  // namespace cuda
}  // namespace actscale
