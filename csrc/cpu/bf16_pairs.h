// Products of bfloat16 numbers two at a time: sum + a0·b0 + a1·b1 in one instruction, VDPBF16PS of AVX512_BF16.
//
// A product of two bfloat16 numbers is exact in float32, and the instruction rounds after each of its two additions, to
// nearest: as exact as two fused multiply-adds of the widened numbers, at half the instructions. It takes the odd
// element first. Numbers below 2^-126 count as 0, in the arguments and in the sums; that moves a product W·h by at most
// d·2^-125·max(1, |W|, |h|), for the largest numbers of W and h.
//
// ACTSCALE_AVX2 with ACTSCALE_BF16_PAIRS is the same in plain instructions, for tests on processors without it.
#pragma once
#include "simd.h"

namespace actscale {
namespace ACTSCALE_LEVEL {

#if defined(ACTSCALE_AVX512)
typedef __m512i Pairs;  // a lane: two bfloat16 numbers, the first one in its low half
INLINE Pairs load_pairs(const float* p) { return _mm512_loadu_si512(p); }
INLINE Pairs set1_pair(uint32_t pair) { return _mm512_set1_epi32(int(pair)); }
INLINE F dot_pairs(F sum, Pairs a, Pairs b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
#else
typedef __m256i Pairs;
INLINE Pairs load_pairs(const float* p) { return _mm256_loadu_si256((const __m256i*)p); }
INLINE Pairs set1_pair(uint32_t pair) { return _mm256_set1_epi32(int(pair)); }
INLINE F flushed(F v) { return _mm256_andnot_ps(_mm256_cmp_ps(absolute(v), set1(FLT_MIN), _CMP_LT_OQ), v); }
INLINE F first_of(Pairs a) { return flushed(_mm256_castsi256_ps(_mm256_slli_epi32(a, 16))); }
INLINE F second_of(Pairs a) {
    return flushed(_mm256_castsi256_ps(_mm256_and_si256(a, _mm256_set1_epi32(int(0xffff0000)))));
}
INLINE F dot_pairs(F sum, Pairs a, Pairs b) {
    sum = flushed(fmadd(second_of(a), second_of(b), flushed(sum)));
    return flushed(fmadd(first_of(a), first_of(b), sum));
}
#endif

INLINE uint32_t pair_at(const bf16* p) {
    uint32_t pair;
    memcpy(&pair, p, 4);  // off its alignment where a row begins at an odd element
    return pair;
}

// The k-th pair of `width` numbers; the second of the last one may be missing and is 0.
INLINE void store_pair(float* out, const bf16* p, int64_t k, int64_t width) {
    const uint32_t pair = 2 * k + 1 < width ? pair_at(p + 2 * k) : p[2 * k].bits;
    memcpy(out, &pair, 4);
}

// z[i][n] = Σ_k w[i][k]·h[k][n] for M rows of W as it is stored and C vectors of hidden states in pairs.
template <int M, int C, int64_t GROUP>
INLINE void products_of_pairs(const bf16* w, int64_t stride, const float* h, int64_t depth, float* z) {
    F sums[M][C];
    UNROLL_LOOPS
    for (int i = 0; i < M; i++)
        for (int j = 0; j < C; j++) sums[i][j] = set1(0);
    for (int64_t k = 0; k + 2 <= depth; k += 2, h += GROUP) {
        Pairs lanes[C];
        for (int j = 0; j < C; j++) lanes[j] = load_pairs(h + j * W);
        UNROLL_LOOPS
        for (int i = 0; i < M; i++) {
            const Pairs weight = set1_pair(pair_at(w + i * stride + k));
            for (int j = 0; j < C; j++) sums[i][j] = dot_pairs(sums[i][j], weight, lanes[j]);
        }
    }
    if (depth % 2) {  // what follows the last number of a row of W belongs to another one
        UNROLL_LOOPS
        for (int i = 0; i < M; i++) {
            const Pairs weight = set1_pair(w[i * stride + depth - 1].bits);
            for (int j = 0; j < C; j++) sums[i][j] = dot_pairs(sums[i][j], weight, load_pairs(h + j * W));
        }
    }
    UNROLL_LOOPS
    for (int i = 0; i < M; i++)
        for (int j = 0; j < C; j++) store(z + i * GROUP + j * W, sums[i][j]);
}

}  // namespace ACTSCALE_LEVEL
}  // namespace actscale
