// linear_softmax with the products of blocks by vectors: W·h and the weighted sums of W's rows in tiles of registers.
//
// Compute-bound from about 8 rows on. W and the hidden states are widened to float32 where they are not. With
// ACTSCALE_BF16_PAIRS the products W·h of bfloat16 are made from pairs instead (bf16_pairs.h), as exactly. The sums of
// W's rows are not: e rounded to bfloat16 would be 2^-9 off, and the mean with it; as two bfloat16 numbers it takes no
// less time than float32.
#pragma once
#include "linear_softmax_splits.h"
#if defined(ACTSCALE_BF16_PAIRS)
#include "bf16_pairs.h"
#endif

namespace actscale {
namespace ACTSCALE_LEVEL {

constexpr int64_t BLOCK_FLOATS = 96 << 10;  // of W: 384 KiB, which leaves room in an L2 of 512 KiB for the products
constexpr int64_t ROWS_CHAIN = 32;          // W's rows whose sum is rounded on its own: its error moves h·mean
#if defined(ACTSCALE_AVX512)
constexpr int TILE = 12;  // rows of a register tile, two vectors wide: 24 of 32 registers
#elif defined(ACTSCALE_AVX2)
constexpr int TILE = 6;
#else
constexpr int TILE = 4;
#endif

// Whether the products of this type are made from pairs.
template <class T> constexpr bool in_pairs(T) { return false; }
#if defined(ACTSCALE_BF16_PAIRS)
constexpr bool in_pairs(bf16) { return true; }
#endif

// z[i][n] = Σ_k w[i][k]·h[k][n] for M rows of W and C vectors of hidden states.
template <int M, int C>
INLINE void products(const float* w, int64_t stride, const float* h, int64_t depth, float* z) {
    F sums[M][C];
    UNROLL_LOOPS
    for (int i = 0; i < M; i++)
        for (int j = 0; j < C; j++) sums[i][j] = set1(0);
    for (int64_t k = 0; k < depth; k++) {
        F lanes[C];
        for (int j = 0; j < C; j++) lanes[j] = load(h + k * GROUP + j * W);
        UNROLL_LOOPS
        for (int i = 0; i < M; i++) {
            const F weight = set1(w[i * stride + k]);
            for (int j = 0; j < C; j++) sums[i][j] = fmadd(weight, lanes[j], sums[i][j]);
        }
    }
    UNROLL_LOOPS
    for (int i = 0; i < M; i++)
        for (int j = 0; j < C; j++) store(z + i * GROUP + j * W, sums[i][j]);
}

#if defined(ACTSCALE_BF16_PAIRS)
template <int M, int C>
INLINE void products(const bf16* w, int64_t stride, const float* h, int64_t depth, float* z) {
    products_of_pairs<M, C, GROUP>(w, stride, h, depth, z);
}
#endif

// sums[i][k] += Σ_v e[v][i]·w[v][k] for M rows and C vectors of columns k.
template <int M, int C>
INLINE void weighted_rows(const float* e, const float* w, int64_t stride, int64_t count, float* sums, int64_t state) {
    F total[M][C];
    UNROLL_LOOPS
    for (int i = 0; i < M; i++)
        for (int j = 0; j < C; j++) total[i][j] = set1(0);
    for (int64_t v = 0; v < count; v++) {
        F row[C];
        for (int j = 0; j < C; j++) row[j] = load(w + v * stride + j * W);
        UNROLL_LOOPS
        for (int i = 0; i < M; i++) {
            const F weight = set1(e[v * GROUP + i]);
            for (int j = 0; j < C; j++) total[i][j] = fmadd(weight, row[j], total[i][j]);
        }
    }
    UNROLL_LOOPS
    for (int i = 0; i < M; i++)
        for (int j = 0; j < C; j++) {
            float* at_sum = sums + i * state + j * W;
            store(at_sum, load(at_sum) + total[i][j]);
        }
}

// Of W as it is stored, with pairs, or as float32.
template <class Weight, int C>
static void products_of_block(const Weight* w, int64_t stride, int64_t count, const float* h, int64_t depth, float* z) {
    int64_t v = 0;
    for (; v + TILE <= count; v += TILE) products<TILE, C>(w + v * stride, stride, h, depth, z + v * GROUP);
    for (; v < count; v++) products<1, C>(w + v * stride, stride, h, depth, z + v * GROUP);
}

template <class Weight>
static void products_of_rows(const Weight* w, int64_t stride, int64_t count, int64_t rows, const float* packed,
                             int64_t depth, float* z) {
    for (int64_t n = 0; n < rows; n += 2 * W) {
        if (rows - n > W) products_of_block<Weight, 2>(w, stride, count, packed + n, depth, z + n);
        else products_of_block<Weight, 1>(w, stride, count, packed + n, depth, z + n);
    }
}

template <int C>
static void weighted_rows_of_group(const float* e, const float* w, int64_t stride, int64_t count, int64_t rows,
                                   float* sums, int64_t state) {
    int64_t n = 0;
    for (; n + TILE <= rows; n += TILE) weighted_rows<TILE, C>(e + n, w, stride, count, sums + n * state, state);
    for (; n + 4 <= rows; n += 4) weighted_rows<4, C>(e + n, w, stride, count, sums + n * state, state);
    for (; n < rows; n++) weighted_rows<1, C>(e + n, w, stride, count, sums + n * state, state);
}

template <class T>
struct VectorProducts {
    struct Thread {};
    const LinearSoftmax& c;
    int64_t depth, block, steps, group_floats, own_floats;

    explicit VectorProducts(const LinearSoftmax& call) : c(call) {
        depth = (c.width + W - 1) / W * W;
        block = greater(16, smaller(256, BLOCK_FLOATS / greater(depth, 1)));
        steps = in_pairs(T()) ? (c.width + 1) / 2 : c.width;  // h[k][n], of a number or a pair of them
        group_floats = steps * GROUP;
        own_floats = block * depth;  // a copy of a block
    }

    bool direct() const { return sizeof(T) == 4 && c.width == depth; }

    void pack(int64_t step, int64_t first, int64_t rows, float* packed) const {
        for (int64_t n = 0; n < GROUP; n++) {
            const T* hidden = at(c.hidden, (first + smaller(n, rows - 1)) * c.hidden_stride, T());
            float* out = packed + step * GROUP + n;
            if (n >= rows) *out = 0;
            else if constexpr (in_pairs(T())) store_pair(out, hidden, step, c.width);
            else *out = widen(hidden[step]);
        }
    }

    void multiply(int64_t v, int64_t count, int64_t rows, const float* packed, float* z, float* copied) const {
        const T* from = at(c.weight, v * c.weight_stride, T());
        if (!direct()) {
            for (int64_t i = 0; i < count; i++) {
                const T* row = from + i * c.weight_stride;
                int64_t k = 0;
                for (; k + W <= c.width; k += W) store(copied + i * depth + k, load(row + k));
                if (k < c.width) store(copied + i * depth + k, load_part(row + k, int(c.width - k), 0));
            }
        }
        if constexpr (in_pairs(T())) products_of_rows(from, c.weight_stride, count, rows, packed, c.width, z);
        else if (direct()) products_of_rows((const float*)from, c.weight_stride, count, rows, packed, c.width, z);
        else products_of_rows((const float*)copied, depth, count, rows, packed, c.width, z);
    }

    void add_rows(int64_t v, int64_t count, int64_t rows, const float* z, float* states, int64_t state,
                  const float* copied) const {
        const float* w = direct() ? (const float*)at(c.weight, v * c.weight_stride, T()) : copied;
        const int64_t stride = direct() ? c.weight_stride : depth;
        for (int64_t k = 0; k < depth; k += 2 * W)
            for (int64_t i = 0; i < count; i += ROWS_CHAIN) {
                const int64_t part = smaller(ROWS_CHAIN, count - i);
                const float *e = z + i * GROUP, *from = w + i * stride + k;
                if (k + W < depth) weighted_rows_of_group<2>(e, from, stride, part, rows, states + k, state);
                else weighted_rows_of_group<1>(e, from, stride, part, rows, states + k, state);
            }
    }
};

template <class T>
static void linear_softmax_of(const LinearSoftmax& c) {
    linear_softmax_by<T, VectorProducts<T>>(c);
}

#if !defined(ACTSCALE_BF16_PAIRS)  // where there are pairs, another level serves the other types
static void linear_softmax(const LinearSoftmax& c) {
    with_type(c.type, [&](auto zero) { linear_softmax_of<decltype(zero)>(c); });
}
#endif

}  // namespace ACTSCALE_LEVEL
}  // namespace actscale
