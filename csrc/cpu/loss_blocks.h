// The first pass over a block of two rows of logits: both powers, their sums, and what the second pass keeps of them.
//
// The formulas, the anchors and the reasons are those of intervention_loss.h. A block that holds an excluded answer, or
// logits to be capped, is worked on as a copy.
#pragma once
#include "kernels.h"
#include "simd.h"
#include "softcap.h"

namespace actscale {
namespace ACTSCALE_LEVEL {

constexpr int64_t BLOCK = 2048;  // two rows of it and their scratch: 32 KiB

// Whether the second pass finds the reference's powers too, and does not make them again. Vectors of 8 floats: 5.8 ms for
// 64 x 49152 float32 make them again; AVX-512 takes fewer instructions for a power, and longer to keep it.
constexpr bool KEEPS_BOTH = W < 16;

constexpr int64_t SAMPLE = 64;    // a sample's anchor is exceeded by far less than 2^40 in real logits
constexpr float LARGE = 0x1p40f;  // a sum beyond it: the powers lie too far above the anchor
// What an exact pass shrinks differences by, so that no sum of them leaves the range of float while their mean is in
// it: a teacher's token that the student masks with the least float is 3e38 apart.
constexpr float SHRINK = 0x1p-24f, GROWTH = 0x1p24f;
constexpr double LOG2E = 1.4426950408889634, LN2 = 0.6931471805599453;

struct Block {
    float z_anchor, r_anchor, z_sum, r_sum;
    double weighted;
};  // weighted: forward to base 2, reverse in nats

INLINE const float* at(const void* p, int64_t i, float) { return (const float*)p + i; }
INLINE const bf16* at(const void* p, int64_t i, bf16) { return (const bf16*)p + i; }
INLINE const half* at(const void* p, int64_t i, half) { return (const half*)p + i; }
INLINE float minus_infinity(float) { return -INFINITY; }
INLINE bf16 minus_infinity(bf16) { return {0xff80}; }
INLINE half minus_infinity(half) { return {0xfc00}; }

INLINE int64_t padded(int64_t count) { return (count + 15) / 16 * 16; }

template <class T>
INLINE float largest(const T* p, int64_t count) {
    F first = set1(-FLT_MAX), second = first;
    int64_t i = 0;
    for (; i + 2 * W <= count; i += 2 * W) first = larger(load(p + i), first), second = larger(load(p + i + W), second);
    for (; i < count; i += W) first = larger(load_part(p + i, int(smaller(W, count - i)), -INFINITY), first);
    return largest_of(larger(first, second));  // -FLT_MAX where all are -inf
}

// c·(v - a) for one a near the largest v. The difference first: equal shifts of a row then change nothing.
struct Powers {
    F factor, anchor;
    INLINE_MEMBER Powers(float a, float scale) : factor(set1(scale)), anchor(set1(a)) {}
    INLINE_MEMBER F below(F v) const { return v - anchor; }
    INLINE_MEMBER F of(F v) const { return below(v) * factor; }
};

INLINE float scale_of(const InterventionLoss& c) { return float(LOG2E * c.inverse_temperature); }

// `EXACT`: with the block's maxima, and with no term where the weight is 0, whatever the difference.
// `slope`: of the soft-cap, a logit; with CAPPED and STORE.
template <class T, bool REVERSE, bool STORE, bool CAPPED, bool EXACT>
INLINE bool sums_of(const T* z, const T* r, int64_t count, float scale, float temperature, const float* slope,
                    float* first, float* second, Block* block) {
    const int64_t whole = count / W * W, sample = EXACT ? count : smaller(count, SAMPLE);
    const int rest = int(count - whole);
    block->z_anchor = largest(z, sample), block->r_anchor = largest(r, sample);
    const Powers z_powers(block->z_anchor, scale), r_powers(block->r_anchor, scale);
    F z_sum = set1(0), r_sum = z_sum, weighted = z_sum;
    const F in_nats = set1(temperature), unit = set1(EXACT ? SHRINK : 1.0f);
    auto step = [&](F zv, F rv, int64_t at) __attribute__((always_inline)) {
        const F y = z_powers.of(zv), x = r_powers.of(rv);
        const F ez = exponential2(y), er = exponential2(x);
        const F weight = REVERSE ? ez : er;
        // log2(e) would take differences of 3e38 out of the range of float.
        const F apart = REVERSE ? z_powers.below(zv) - r_powers.below(rv) : r_powers.below(rv) - z_powers.below(zv);
        F difference = REVERSE ? apart * in_nats : EXACT ? apart : x - y;
        if (EXACT) difference = keep(not_below(weight, set1(FLT_MIN)), difference);
        z_sum = z_sum + ez, r_sum = r_sum + er;
        weighted = fmadd(weight, EXACT ? difference * unit : difference, weighted);
        if (STORE) store(first + at, CAPPED ? ez * load(slope + at) : ez);
        if (STORE && REVERSE) store(second + at, difference);
        if (STORE && CAPPED && !REVERSE) store(second + at, er * load(slope + at));
        if (STORE && KEEPS_BOTH && !CAPPED && !REVERSE) store(second + at, er);
    };
    for (int64_t i = 0; i < whole; i += W) {
        if (!CAPPED) __builtin_prefetch(z + i + BLOCK), __builtin_prefetch(r + i + BLOCK);
        step(load(z + i), load(r + i), i);
    }
    if (rest) step(load_part(z + whole, rest, -INFINITY), load_part(r + whole, rest, -INFINITY), whole);
    block->z_sum = sum_of(z_sum), block->r_sum = sum_of(r_sum);
    const float total = sum_of(weighted);
    block->weighted = EXACT ? double(total) * GROWTH * (REVERSE ? 1.0f : scale) : total;
    // NaN and infinity fail these.
    return block->z_sum <= LARGE && block->r_sum <= LARGE && fabsf(total) <= FLT_MAX;
}

template <class T, bool REVERSE, bool STORE, bool CAPPED>
INLINE void first_pass(const T* z, const T* r, int64_t count, const InterventionLoss& c, const float* slope,
                       float* first, float* second, Block* block) {
    const float scale = scale_of(c), t = c.inverse_temperature;
    if (!sums_of<T, REVERSE, STORE, CAPPED, false>(z, r, count, scale, t, slope, first, second, block))
        sums_of<T, REVERSE, STORE, CAPPED, true>(z, r, count, scale, t, slope, first, second, block);
}

// `to` and `slope` have room for whole vectors.
template <class T> INLINE void cap(const T* from, int64_t count, const Cap& softcap, float* to, float* slope) {
    for (int64_t i = 0; i < count; i += W) {
        __builtin_prefetch(from + i + BLOCK);
        F steepness;
        const int n = int(smaller(W, count - i));
        store(to + i, softcap.of(n == W ? load(from + i) : load_part(from + i, n, 0), &steepness));
        if (slope) store(slope + i, steepness);
    }
}

// The block at column `begin` of the row.
template <class T, bool REVERSE, bool STORE>
static void first_pass_capped(const InterventionLoss& c, int64_t row, int64_t begin, float* first, float* second,
                              Block* block) {
    const int64_t count = smaller(BLOCK, c.vocab - begin);
    const Cap softcap(c.softcap);
    float z[BLOCK], r[BLOCK], slope[BLOCK];
    cap(at(c.logits, row * c.logits_stride + begin, T()), count, softcap, z, STORE ? slope : nullptr);
    cap(at(c.reference, row * c.reference_stride + begin, T()), count, softcap, r, nullptr);
    first_pass<float, REVERSE, STORE, true>(z, r, count, c, slope, first, second, block);
}

// The block at column `begin` of the row; where it holds an excluded answer, of a copy without it.
template <class T, bool REVERSE, bool STORE>
static void first_pass_of(const InterventionLoss& c, int64_t row, int64_t begin, float* first, float* second,
                          Block* block) {
    const int64_t count = smaller(BLOCK, c.vocab - begin);
    const T* z = at(c.logits, row * c.logits_stride + begin, T());
    const T* r = at(c.reference, row * c.reference_stride + begin, T());
    T z_copy[BLOCK], r_copy[BLOCK];
    if (c.exclude_answers && c.correct) {
        const int64_t answers[2] = {c.correct[row] - begin, c.wrong[row] - begin};
        const bool inside[2] = {answers[0] >= 0 && answers[0] < count, answers[1] >= 0 && answers[1] < count};
        if (inside[0] || inside[1]) {
            memcpy(z_copy, z, count * sizeof(T)), memcpy(r_copy, r, count * sizeof(T));
            for (int a = 0; a < 2; a++)
                if (inside[a]) z_copy[answers[a]] = r_copy[answers[a]] = minus_infinity(T());
            z = z_copy, r = r_copy;
        }
    }
    first_pass<T, REVERSE, STORE, false>(z, r, count, c, nullptr, first, second, block);
}

}  // namespace ACTSCALE_LEVEL
}  // namespace actscale
