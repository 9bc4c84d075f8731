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

// One block's share of a row. A slot is where a vector of each side lies in shared memory; `at` counts slots.
template <class T> struct Share {
    const T *w, *o;  // the row's first columns
    T* grad;         // or null
    int vocab, first_column;
    int count;  // vectors; one more or less from row to row, as rows lie on the grid
    int steps;
    int inside_from, inside_to;  // steps whose vectors all lie within the row, on the grid of both sides
    Vector *slots_w, *slots_o;
    bool w_on_grid, o_on_grid;
    int answers[2];     // the vectors of c and w, or -1
    int columns[2];     // within those
    int answers_in[2];  // their steps, or -1
    int hidden_in[2];   // the same where they do not take part, else -1

    DEVICE int vector(int step, int u) const { return step * STEP<T> + u * THREADS + int(threadIdx.x); }
    DEVICE static int slot(int at, int u) { return at + u * THREADS + int(threadIdx.x); }
    DEVICE int column(int v) const { return first_column + v * WIDTH<T>; }
    DEVICE bool in_row(int column) const { return column >= 0 && column < vocab; }
    DEVICE bool is_full(int step) const { return (step + 1) * STEP<T> <= count; }
    DEVICE bool is_inside(int step) const { return step >= inside_from && step < inside_to; }
    DEVICE bool has_answer(int step) const { return step == answers_in[0] || step == answers_in[1]; }

    // Begins the copy of a step of both sides into the slots from `at` on.
    DEVICE void stage(int step, int at) const {
        if (is_inside(step)) {
            const int first = column(vector(step, 0));
            const T *from_w = w + first, *from_o = o + first;
#pragma unroll
            for (int u = 0; u < UNROLL<T>; u++) {
                copy_async(slots_w + slot(at, u), from_w + u * THREADS * WIDTH<T>);
                copy_async(slots_o + slot(at, u), from_o + u * THREADS * WIDTH<T>);
            }
        } else if (step >= 0 && step < steps) {
#pragma unroll
            for (int u = 0; u < UNROLL<T>; u++) {
                const int v = vector(step, u);
                if (v >= count) continue;
                fetch(w, column(v), vocab, w_on_grid, slots_w + slot(at, u));
                fetch(o, column(v), vocab, o_on_grid, slots_o + slot(at, u));
            }
        }
        copy_async_commit();  // an empty group too: the wait counts them
    }

    // This thread's vectors of a step. An answer that does not take part is -inf on both sides, and so is what lies
    // beyond the share.
    DEVICE void load(int step, int at, Vector (&of_w)[UNROLL<T>], Vector (&of_o)[UNROLL<T>]) const {
        if (step == hidden_in[0] || step == hidden_in[1])
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int from_first = answers[i] - step * STEP<T>;
                if (answers[i] < 0 || from_first < 0 || from_first >= STEP<T>) continue;
                if (from_first % THREADS != int(threadIdx.x)) continue;
                reinterpret_cast<T*>(slots_w + at + from_first)[columns[i]] = minus_infinity(T());
                reinterpret_cast<T*>(slots_o + at + from_first)[columns[i]] = minus_infinity(T());
            }
        if (is_full(step)) {
#pragma unroll
            for (int u = 0; u < UNROLL<T>; u++) of_w[u] = slots_w[slot(at, u)], of_o[u] = slots_o[slot(at, u)];
        } else {
#pragma unroll
            for (int u = 0; u < UNROLL<T>; u++) {
                of_w[u] = of_o[u] = nothing(T());
                if (vector(step, u) < count) of_w[u] = slots_w[slot(at, u)], of_o[u] = slots_o[slot(at, u)];
            }
        }
    }
};

template <class T, bool CAPPED>
DEVICE void scan_step(const Share<T>& share, int step, int at, float scale, const Cap& cap, Sums& sums) {
    constexpr int W = WIDTH<T>;
    Vector of_w[UNROLL<T>], of_o[UNROLL<T>];
    share.load(step, at, of_w, of_o);
    float w[PER_THREAD], o[PER_THREAD];
#pragma unroll
    for (int u = 0; u < UNROLL<T>; u++) {
        float part_w[W], part_o[W];
        unpack(of_w[u], part_w, T()), unpack(of_o[u], part_o, T());
        const int v = share.vector(step, u);
        if (CAPPED && v < share.count)  // what lies beyond the row's ends stays -inf
#pragma unroll
            for (int e = 0; e < W; e++)
                if (share.in_row(share.column(v) + e))
                    part_w[e] = cap.of(part_w[e]).value, part_o[e] = cap.of(part_o[e]).value;
#pragma unroll
        for (int e = 0; e < W; e++) w[u * W + e] = part_w[e], o[u * W + e] = part_o[e];
    }
    if (CAPPED) scan(sums, w, o, top_of(w), top_of(o), scale);
    else scan(sums, w, o, top_of(of_w, T()), top_of(of_o, T()), scale);
}

template <class T, bool CAPPED, bool REVERSE>
DEVICE void gradient_step(const Share<T>& share, int step, int at, float hinge, const Cap& cap, const Softmaxes& s) {
    constexpr int W = WIDTH<T>;
    Vector of_w[UNROLL<T>], of_o[UNROLL<T>];
    share.load(step, at, of_w, of_o);
    const bool is_plain = share.is_inside(step) && !share.has_answer(step);
    T* to = share.grad + share.column(share.vector(step, 0));
#pragma unroll
    for (int u = 0; u < UNROLL<T>; u++) {
        float w[W], g[W];
        unpack(of_w[u], w, T()), unpack(of_o[u], g, T());
#pragma unroll
        for (int e = 0; e < W; e++) {
            if (CAPPED) {
                const Capped of_w = cap.of(w[e]), of_o = cap.of(g[e]);
                g[e] = (REVERSE ? of_w.slope : of_o.slope) * kl_gradient<REVERSE>(of_w.value, of_o.value, s);
            } else {
                g[e] = kl_gradient<REVERSE>(w[e], g[e], s);
            }
        }
        if (is_plain) {
            *reinterpret_cast<Vector*>(to + u * THREADS * W) = pack(g, T());
            continue;
        }
        const int v = share.vector(step, u);
        if (v >= share.count) continue;
        const int at_c = v == share.answers[0] ? share.columns[0] : -1;
        const int at_w = v == share.answers[1] ? share.columns[1] : -1;
        if (at_c >= 0 || at_w >= 0)
#pragma unroll
            for (int e = 0; e < W; e++) g[e] += (e == at_c ? hinge : 0.0f) - (e == at_w ? hinge : 0.0f);
        put(share.grad, share.column(v), share.vocab, pack(g, T()));
    }
}

// The share's gradient, backwards: what was read last lies in L2 where the rows are not kept, and is copied again.
template <class T, bool CAPPED, bool REVERSE>
DEVICE void gradient(const Share<T>& share, bool kept, float hinge, const Cap& cap, const Softmaxes& s) {
    const int last = share.steps - 1;
    int read = kept ? last * STEP<T> : 0, write = AHEAD * STEP<T>;
    if (!kept)
        for (int turn = 0; turn < AHEAD; turn++) share.stage(last - turn, turn * STEP<T>);
    for (int step = last; step >= 0; step--) {
        if (!kept) {
            share.stage(step - AHEAD, write);
            copy_async_wait<AHEAD>();
            write = write == AHEAD * STEP<T> ? 0 : write + STEP<T>;
        }
        gradient_step<T, CAPPED, REVERSE>(share, step, read, hinge, cap, s);
        read = kept ? read - STEP<T> : read == AHEAD * STEP<T> ? 0 : read + STEP<T>;
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
