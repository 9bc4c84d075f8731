// α = ⟨w, x⟩ + c and y = x·(1 + β·α) for each head. Backward, with a = β·⟨x, dy⟩ + dα (the upstream of α, or 0):
// dx = dy·(1 + β·α) + a·w, dw = Σ a·x, dc = Σ a in one pass over x and dy. Saved: x, w, and α in float.
//
// Moved: forward 2 elements of x's type per element and 4 bytes per head's vector for α; backward 3 (dy, x, dx), 2
// where dx is not wanted. A vector is read twice, for its product and for its sums, the second time from the cache. The
// sums are cut and joined as those of scale_heads are: see there for why two runs and any number of threads agree bit
// for bit. Where there are several groups a chunk is of one row, since every row may have a probe of its own.
#pragma once
#include "scale_heads.h"

namespace actscale {
namespace ACTSCALE_LEVEL {

// Σ p·q over `width` values, in two chains of W lanes.
template <class P, class Q> INLINE float dot_product(const P* p, const Q* q, int64_t width) {
    F sum = set1(0), sum2 = sum;
    int64_t d = 0;
    for (; d + 2 * W <= width; d += 2 * W) {
        sum = fmadd(load(p + d), load(q + d), sum);
        sum2 = fmadd(load(p + d + W), load(q + d + W), sum2);
    }
    if (d + W <= width) sum = fmadd(load(p + d), load(q + d), sum), d += W;
    if (d < width) {
        const int rest = int(width - d);
        sum2 = fmadd(load_part(p + d, rest, 0), load_part(q + d, rest, 0), sum2);
    }
    return sum_of(sum + sum2);
}

template <class T>
static void dynamic_scale_of(const DynamicScale& c) {
    const int64_t tokens = c.rows * c.positions;
    const int threads = tokens * c.heads * c.width < SERIAL_ELEMENTS ? 1 : int(smaller(c.threads, tokens));
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < tokens; i++) {
        const int64_t b = i / c.positions, t = i % c.positions, g = group_of(c, b);
        const float beta = strength_of(c, b);
        const T* x = (const T*)c.x + b * c.x_stride[0] + t * c.x_stride[1];
        T* y = (T*)c.out + b * c.out_stride[0] + t * c.out_stride[1];
        for (int64_t h = 0; h < c.heads; h++) {
            const T* head = x + h * c.x_stride[2];
            float alpha = dot_product(head, c.weight + (g * c.heads + h) * c.width, c.width);
            if (c.bias) alpha += c.bias[g * c.heads + h];
            c.scalars[i * c.heads + h] = alpha;
            scale_row(head, y + h * c.out_stride[2], (const float*)nullptr, 1 + beta * alpha, beta, c.width);
        }
    }
}

// One (row, position, head): dx = dy·factor + a·w, and a·x onto `sums`; either may be null.
template <class T>
INLINE void dynamic_scale_backward_row(const T* dy, const T* x, const float* w, T* dx, float* sums, float factor,
                                       float a, int64_t width) {
    const F f = set1(factor), av = set1(a);
    auto step = [&](int64_t d, int n) __attribute__((always_inline)) {
        const bool whole = n == W;
        if (dx) {
            const F probe = whole ? load(w + d) : load_part(w + d, n, 0);
            const F value = fmadd(av, probe, (whole ? load(dy + d) : load_part(dy + d, n, 0)) * f);
            whole ? store(dx + d, value) : store_part(dx + d, value, n);
        }
        if (sums) {
            const F value = whole ? fmadd(av, load(x + d), load(sums + d))
                                  : fmadd(av, load_part(x + d, n, 0), load_part(sums + d, n, 0));
            whole ? store(sums + d, value) : store_part(sums + d, value, n);
        }
    };
    int64_t d = 0;
    for (; d + W <= width; d += W) step(d, W);
    if (d < width) step(d, int(width - d));
}

// One chunk's tokens for some of the heads. `bias_sums`: a's sum in the first of W lanes a head.
template <class T>
static void dynamic_scale_backward_chunk(const DynamicScale& c, const Plan& p, int64_t chunk, int64_t head_begin,
                                         int64_t head_end, float* bias_sums, float* weight_sums, T* gathered) {
    const int64_t b_begin = chunk / p.position_chunks * p.rows, b_end = smaller(c.rows, b_begin + p.rows);
    const int64_t t_begin = chunk % p.position_chunks * p.positions;
    const int64_t t_end = smaller(c.positions, t_begin + p.positions);
    const bool gather = c.dy_stride[3] != 1;  // one head of dy at a time, into `gathered`
    const T* gathered_from = nullptr;
    for (int64_t b = b_begin; b < b_end; b++) {
        const int64_t g = group_of(c, b);
        const float beta = strength_of(c, b);
        for (int64_t t = t_begin; t < t_end; t++) {
            for (int64_t h = head_begin; h < head_end; h++) {
                const T* dy = (const T*)c.dy + b * c.dy_stride[0] + t * c.dy_stride[1] + h * c.dy_stride[2];
                if (gather) {
                    if (dy != gathered_from)
                        for (int64_t d = 0; d < c.width; d++) gathered[d] = dy[d * c.dy_stride[3]];
                    gathered_from = dy, dy = gathered;
                }
                const T* x = (const T*)c.x + b * c.x_stride[0] + t * c.x_stride[1] + h * c.x_stride[2];
                T* dx = (T*)c.out;
                if (dx) dx += b * c.out_stride[0] + t * c.out_stride[1] + h * c.out_stride[2];
                float a = beta * dot_product(x, dy, c.width);
                if (c.d_scalars)
                    a += c.d_scalars[b * c.d_scalars_stride[0] + t * c.d_scalars_stride[1] + h * c.d_scalars_stride[2]];
                if (p.alpha_floats) bias_sums[h * W] += a;
                dynamic_scale_backward_row(dy, x, c.weight + (g * c.heads + h) * c.width, dx,
                                           p.shift_floats ? weight_sums + h * c.width : nullptr,
                                           1 + beta * c.scalars[(b * c.positions + t) * c.heads + h], a, c.width);
            }
        }
    }
}

template <class T>
static void dynamic_scale_backward_of(const DynamicScale& c) {
    ScaleHeads sums = {};  // dc is summed as dα is there, dw as dv: one of each a group, for all positions
    sums.rows = c.rows, sums.positions = c.positions, sums.heads = c.heads, sums.width = c.width;
    sums.groups = c.groups, sums.group = c.group, sums.threads = c.threads;
    sums.alpha_positions = sums.shift_positions = 1, sums.dalpha = c.dbias, sums.dshift = c.dweight;
    const Plan p = plan_of(sums);
    over_chunks(sums, p, [&](int64_t chunk, int64_t begin, int64_t end, float* bias, float* weight, float* own) {
        dynamic_scale_backward_chunk<T>(c, p, chunk, begin, end, bias, weight, (T*)own);
    });
}

static void dynamic_scale(const DynamicScale& c) {
    with_type(c.type, [&](auto zero) { dynamic_scale_of<decltype(zero)>(c); });
}

static void dynamic_scale_backward(const DynamicScale& c) {
    with_type(c.type, [&](auto zero) { dynamic_scale_backward_of<decltype(zero)>(c); });
}

}  // namespace ACTSCALE_LEVEL
}  // namespace actscale
