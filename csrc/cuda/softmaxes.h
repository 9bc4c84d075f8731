// Two softmaxes over the same columns in one pass: the sums of a KL divergence, and its gradient. The formulas, their
// order and their zeros are explained in actscale_fast/ops/triton/softmaxes.py:
//
//   KL = i·A/L_w + log(L_o/L_w),   A = Σ e^{i(w−M_w)}·((w−M_w) − (o−M_o)),   L = Σ e^{i(·−M)},   M: the maxima
//   dF/dz = i·(q − p) forward, i·q·(log q − log p − F) reverse, p and q from e^{i(·−M) − log L}
//   u = s·tanh(v/s), du/dv = 1 − tanh²(v/s)   the soft-cap of either side's logits v on request
//
// w: the logits of the weighting distribution, o: the other ones, i: the inverse temperature. Equal rows give A = 0 and
// L_o = L_w, and subtract equal numbers: exactly 0, as long as both sides are rounded alike. So no product beside a sum
// is left to the compiler, which may contract one side's and not the other's: it is an fma or a product rounded by
// itself. Sums are merged in a fixed order, so two runs agree bit for bit.
#pragma once
#include "device.h"

namespace actscale {
namespace cuda {

// With e = 2^x, x = 2·log2(e)·v/s:  tanh = (e - 1)/(e + 1),  1 - tanh² = 4·e/(e + 1)². e - 1 comes from the polynomial
// of 2^f, |f| <= 1/2, without its 1, so that small logits keep their digits; the slope is no difference of two ones.
struct Capped {
    float value, slope;
};
struct Cap {
    float to_power, softcap;

    DEVICE Capped of(float v) const {
        float x = rounded_product(v, to_power);
        x = x > 64 ? 64.0f : x < -64 ? -64.0f : x;  // NaN stays; beyond, tanh is 1 and the slope below 3e-19
        const float magic = 0x1.8p23f, shifted = x + magic, f = x - (shifted - magic);  // its lowest bits are x rounded
        const float power = bits_to_float((float_to_bits(shifted) << 23) + 0x3f800000u);
        float q = fmaf(0x1.446c7ep-13f, f, 0x1.5f88fep-10f);
        q = fmaf(q, f, 0x1.3b29e4p-7f);
        q = fmaf(q, f, 0x1.c6ae2cp-5f);
        q = fmaf(q, f, 0x1.ebfbe0p-3f);
        const float part = rounded_product(f, fmaf(q, f, 0x1.62e432p-1f));  // 2^f - 1
        const float less_one = fmaf(power, part, power - 1);
        const float inverse = reciprocal(less_one + 2);
        const float slope = rounded_product(rounded_product(fmaf(power, part, power), inverse), inverse);
        return {rounded_product(rounded_product(less_one, inverse), softcap), 4 * slope};
    }
};

struct Sums {
    float top_w, sum_w, top_o, sum_o, a;
};  // a: A/2^24
constexpr int SUMS = 5;
constexpr float SHRINK = 0x1p-24f, GROWTH = 0x1p24f;  // of A: no sum of finite differences overflows

DEVICE Sums no_sums() { return {minus_infinity(), 0, minus_infinity(), 0, 0}; }

// A maximum that may be subtracted: 0 stands for that of nothing but -inf.
DEVICE float finite(float top) { return top == minus_infinity() ? 0.0f : top; }

// The same sums relative to other maxima; where nothing of the weight is left, A is 0 even if it was infinite.
DEVICE void move(Sums& s, float top_w, float top_o, float scale) {
    const float factor = exp2_approximate((s.top_w - finite(top_w)) * scale);
    float delta = ((finite(s.top_w) - finite(top_w)) - (finite(s.top_o) - finite(top_o))) * SHRINK;
    if (s.top_o == minus_infinity()) delta = 0;  // A is infinite, or nothing has been weighed
    s.a = factor == 0 ? 0.0f : factor * (s.a + s.sum_w * delta);
    s.sum_w = rounded_product(s.sum_w, factor);
    s.sum_o = rounded_product(s.sum_o, exp2_approximate((s.top_o - finite(top_o)) * scale));
    s.top_w = top_w, s.top_o = top_o;
}

DEVICE void add(Sums& s, const Sums& other) { s.sum_w += other.sum_w, s.sum_o += other.sum_o, s.a += other.a; }

template <int N> DEVICE float top_of(const float (&values)[N]) {
    float top = values[0];
#pragma unroll
    for (int i = 1; i < N; i++) top = fmaxf(top, values[i]);
    return top;
}
template <int N> DEVICE float top_of(const Vector (&values)[N], float32) {
    float top = minus_infinity();
#pragma unroll
    for (int i = 0; i < 4 * N; i++) top = fmaxf(top, bits_to_float(values[i / 4].word[i % 4]));
    return top;
}
// Two at a time.
template <int N, class T> DEVICE float top_of(const Vector (&values)[N], T zero) {
    uint32_t pair = values[0].word[0];
#pragma unroll
    for (int i = 1; i < 4 * N; i++) pair = pair_max(pair, values[i / 4].word[i % 4], zero);
    return fmaxf(widen(T{uint16_t(pair)}), widen(T{uint16_t(pair >> 16)}));
}

// Adds N columns of each side, whose maxima are given.
template <int N>
DEVICE void scan(Sums& s, const float (&w)[N], const float (&o)[N], float top_w, float top_o, float scale) {
    move(s, fmaxf(s.top_w, top_w), fmaxf(s.top_o, top_o), scale);
    // Differences times SHRINK, rounded as the differences would be: it is a power of 2.
    const float base_w = finite(s.top_w) * SHRINK, base_o = finite(s.top_o) * SHRINK, grown = scale * GROWTH;
    Sums here = {0, 0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < N; i++) {
        const float x = fmaf(w[i], SHRINK, -base_w), y = fmaf(o[i], SHRINK, -base_o);
        const float e = exp2_approximate(x * grown);
        here.sum_w += e;
        here.sum_o += exp2_approximate(y * grown);
        if (e != 0) here.a = fmaf(e, x - y, here.a);
    }
    add(s, here);
}

// The sums of all threads of a block, the same bits in each. `scratch`: 5 floats per warp.
template <int WARPS> DEVICE Sums over_block(Sums s, float scale, float* scratch) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const float warp_w = warp_max(s.top_w), warp_o = warp_max(s.top_o);
    if (lane == 0) scratch[warp] = warp_w, scratch[WARPS + warp] = warp_o;
    __syncthreads();
    float top_w = scratch[0], top_o = scratch[WARPS];
#pragma unroll
    for (int i = 1; i < WARPS; i++) top_w = fmaxf(top_w, scratch[i]), top_o = fmaxf(top_o, scratch[WARPS + i]);
    move(s, top_w, top_o, scale);
    s.sum_w = warp_sum(s.sum_w), s.sum_o = warp_sum(s.sum_o), s.a = warp_sum(s.a);
    float* sums = scratch + 2 * WARPS;
    if (lane == 0) sums[warp] = s.sum_w, sums[WARPS + warp] = s.sum_o, sums[2 * WARPS + warp] = s.a;
    __syncthreads();
    s.sum_w = s.sum_o = s.a = 0;
#pragma unroll
    for (int i = 0; i < WARPS; i++) s.sum_w += sums[i], s.sum_o += sums[WARPS + i], s.a += sums[2 * WARPS + i];
    return s;
}

// The sums of all blocks of the cluster, the same bits in each. The caller waits for the cluster before it ends: until
// then another block may still read `mine`. `mine`: 5 floats, `all`: 5 a block.
DEVICE Sums over_cluster(const Sums& s, int blocks, float scale, float* mine, float* all) {
    const int thread = threadIdx.x;
    if (thread == 0) mine[0] = s.top_w, mine[1] = s.sum_w, mine[2] = s.top_o, mine[3] = s.sum_o, mine[4] = s.a;
    cluster_arrive(), cluster_wait();
    if (thread < SUMS * blocks) all[thread] = in_block(mine, thread / SUMS)[thread % SUMS];
    cluster_arrive();
    __syncthreads();
    Sums total = no_sums();
    for (int i = 0; i < blocks; i++)
        total.top_w = fmaxf(total.top_w, all[SUMS * i]), total.top_o = fmaxf(total.top_o, all[SUMS * i + 2]);
    for (int i = 0; i < blocks; i++) {
        Sums part = {all[SUMS * i], all[SUMS * i + 1], all[SUMS * i + 2], all[SUMS * i + 3], all[SUMS * i + 4]};
        move(part, total.top_w, total.top_o, scale);
        add(total, part);
    }
    return total;
}

// What the gradient of a row needs; the logarithms are to base 2. `factor`: the inverse temperature times the row's
// weight.
struct Softmaxes {
    float base_w, log_w, base_o, log_o, divergence, scale, factor;
};

template <bool REVERSE> DEVICE float kl_gradient(float w, float o, const Softmaxes& s) {
    const float x = w - s.base_w, y = o - s.base_o, q = exp2_approximate(fmaf(x, s.scale, -s.log_w));
    if (!REVERSE) return s.factor * (exp2_approximate(fmaf(y, s.scale, -s.log_o)) - q);
    // In nats: to base 2, differences of 3e38 would overflow.
    const float ratio = fmaf(x - y, rounded_product(s.scale, LN2), -rounded_product(s.log_w - s.log_o, LN2));
    return q == 0 ? 0.0f : s.factor * q * (ratio - s.divergence);
}

}  // namespace cuda
}  // namespace actscale
