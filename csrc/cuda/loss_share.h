// One block's share of a row of logits: how its vectors come into shared memory, are summed up and become the gradient.
#pragma once
#include "rows.h"
#include "softmaxes.h"

namespace actscale {
namespace cuda {

constexpr int THREADS = 256, WARPS = THREADS / 32;
// Columns a thread takes in a step: two to four 16-byte vectors of each tensor, so that the running maxima, which cost
// two exponentials per step, are a twelfth of the work.
constexpr int PER_THREAD = 16;
// Steps copied ahead of the one in work: 32 to 64 KB under way a block, two blocks or more a multiprocessor.
constexpr int AHEAD = 2;
// Blocks a multiprocessor that the registers allow: 65536 / (2 · 256) = 128 each.
constexpr int RESIDENT = 2;

template <class T> constexpr int UNROLL = PER_THREAD / WIDTH<T>;
template <class T> constexpr int STEP = THREADS * UNROLL<T>;  // vectors

// One block's share of a row.
template <class T> struct Share {
    const T *w, *o;  // the row's first columns
    T* grad;         // or null
    int vocab, first_column;
    int count;  // vectors; one more or less from row to row, as rows lie on the grid
    Vector *slots_w, *slots_o;
    int ring;  // steps that the slots hold
    int steps;
    bool w_on_grid, o_on_grid;
    int answers[2];  // the vectors of c and w, or -1
    int columns[2];  // within those

    DEVICE int vector(int step, int u) const { return step * STEP<T> + u * THREADS + int(threadIdx.x); }
    DEVICE int slot(int turn, int u) const { return turn % ring * STEP<T> + u * THREADS + int(threadIdx.x); }
    DEVICE int column(int v) const { return first_column + v * WIDTH<T>; }
    DEVICE bool in_row(int column) const { return column >= 0 && column < vocab; }

    DEVICE void stage(int step, int turn) const {
        if (step >= 0 && step < steps)
#pragma unroll
            for (int u = 0; u < UNROLL<T>; u++) {
                const int v = vector(step, u);
                if (v >= count) continue;
                fetch(w, column(v), vocab, w_on_grid, slots_w + slot(turn, u));
                fetch(o, column(v), vocab, o_on_grid, slots_o + slot(turn, u));
            }
        copy_async_commit();  // an empty group too: the wait counts them
    }

    // An answer that does not take part is -inf on both sides.
    DEVICE void exclude(int v, int at) const {
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (v == answers[i]) {
                reinterpret_cast<T*>(slots_w + at)[columns[i]] = minus_infinity(T());
                reinterpret_cast<T*>(slots_o + at)[columns[i]] = minus_infinity(T());
            }
    }
};

template <class T, bool CAPPED>
DEVICE void scan_step(const Share<T>& share, int step, bool exclude, float scale, const Cap& cap, Sums& sums) {
    constexpr int W = WIDTH<T>;
    float w[PER_THREAD], o[PER_THREAD];
#pragma unroll
    for (int u = 0; u < UNROLL<T>; u++) {
        const int v = share.vector(step, u), at = share.slot(step, u);
        float part_w[W], part_o[W];
#pragma unroll
        for (int e = 0; e < W; e++) part_w[e] = part_o[e] = minus_infinity();
        if (v < share.count) {
            if (exclude) share.exclude(v, at);
            unpack(share.slots_w[at], part_w, T());
            unpack(share.slots_o[at], part_o, T());
            if (CAPPED)  // what lies beyond the row's ends stays -inf
#pragma unroll
                for (int e = 0; e < W; e++)
                    if (share.in_row(share.column(v) + e))
                        part_w[e] = cap.of(part_w[e]).value, part_o[e] = cap.of(part_o[e]).value;
        }
#pragma unroll
        for (int e = 0; e < W; e++) w[u * W + e] = part_w[e], o[u * W + e] = part_o[e];
    }
    scan(sums, w, o, scale);
}

template <class T, bool CAPPED>
DEVICE void gradient_step(const Share<T>& share, int step, int turn, bool exclude, float hinge, const Cap& cap,
                          const Softmaxes& s) {
    constexpr int W = WIDTH<T>;
#pragma unroll
    for (int u = 0; u < UNROLL<T>; u++) {
        const int v = share.vector(step, u), at = share.slot(turn, u);
        if (v >= share.count) continue;
        if (exclude) share.exclude(v, at);
        float w[W], g[W];
        unpack(share.slots_w[at], w, T());
        unpack(share.slots_o[at], g, T());
#pragma unroll
        for (int e = 0; e < W; e++) {
            if (CAPPED) {
                const Capped of_w = cap.of(w[e]), of_o = cap.of(g[e]);
                const float slope = s.reverse ? of_w.slope : of_o.slope;
                g[e] = slope * kl_gradient(of_w.value, of_o.value, s);
            } else {
                g[e] = kl_gradient(w[e], g[e], s);
            }
        }
        const int at_c = v == share.answers[0] ? share.columns[0] : -1;
        const int at_w = v == share.answers[1] ? share.columns[1] : -1;
        if (at_c >= 0 || at_w >= 0)
#pragma unroll
            for (int e = 0; e < W; e++) g[e] += (e == at_c ? hinge : 0.0f) - (e == at_w ? hinge : 0.0f);
        put(share.grad, share.column(v), share.vocab, pack(g, T()));
    }
}

// The gradient of a row of weight 0.
template <class T> DEVICE void put_zeros(const Share<T>& share) {
    for (int step = 0; step < share.steps; step++)
#pragma unroll
        for (int u = 0; u < UNROLL<T>; u++) {
            const int v = share.vector(step, u);
            if (v < share.count) put(share.grad, share.column(v), share.vocab, Vector{});
        }
}

}  // namespace cuda
}  // namespace actscale
