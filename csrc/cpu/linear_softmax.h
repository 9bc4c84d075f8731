// The softmax over a vocabulary and its mean of the rows of W, straight from hidden states: attention with K = V = W.
//
//   z = s·(W·h + b),  q = softmax(z) over the columns that are kept
//   log_sum = log Σ exp(z),  mean = Σ q·W (d floats per row),  mean_bias = Σ q·b,  answers = z at the two answers
//
// A KL divergence is a small difference of log_sums, and the products' roundings δ move a plain one by Σ q·δ. Therefore
// log_sum is put together as H(q) + s·(h·mean + mean_bias), which is stationary in q: errors of q enter squared.
//
// W is read from memory once for every GROUP rows. A block of W (BLOCK_FLOATS, in L2 from then on) is multiplied with
// the hidden states, the products become powers of two relative to a running maximum, and these weight the same block's
// rows: 4·N·V·d operations, compute-bound from about 8 rows on. No [N, V] exists; beside the results there are a block
// of products a thread and d + 16 floats per row and split, for GROUP rows or as many as `bytes` allows.
//
// V is cut into splits by its size alone, their sums are joined in order, and a row's products and sums run over the
// same lanes in the same order whatever rows stand beside it: every number of threads and every batch give the same
// bits. That makes the KL divergence of a row to itself exactly 0.
//
// W and the hidden states are widened to float32 where they are not. With ACTSCALE_BF16_PAIRS the products W·h of
// bfloat16 are made from pairs instead (bf16_pairs.h), as exactly. The sums of W's rows are not: e rounded to bfloat16
// would be 2^-9 off, and log_sum with it, in the first order; as two bfloat16 numbers it takes no less time than float32.
#pragma once
#include "loss_blocks.h"
#if defined(ACTSCALE_BF16_PAIRS)
#include "bf16_pairs.h"
#endif

namespace actscale {
namespace ACTSCALE_LEVEL {

constexpr int64_t GROUP = 64;               // rows whose products are made together
constexpr int64_t BLOCK_FLOATS = 96 << 10;  // of W: 384 KiB, which leaves room in an L2 of 512 KiB for the products
// A chain of additions rounds as often as it is long. An error of Σ e moves log_sum by itself times h·mean, one of the
// mean by its product with h.
constexpr int64_t CHAIN = 16, ROWS_CHAIN = 32;
constexpr float BIAS_UNIT = 0x1p-8f;  // a chain of biases at the least float, which masks a token, stays in range
constexpr int64_t SPLIT_COLUMNS = 4096, MOST_SPLITS = 16;
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

struct LinearPlan {
    int64_t block, splits, depth, rows;  // columns per block; d padded to whole vectors; rows at a time
    int64_t state;                       // floats per row and split: the sum of W's rows, then `Running`
};

struct Running {
    double sum, power_sum, bias_sum, anchor;
    float largest;
};  // of one row in one split

static LinearPlan plan_of(const LinearSoftmax& c) {
    LinearPlan p;
    p.depth = (c.width + W - 1) / W * W;
    p.block = greater(16, smaller(256, BLOCK_FLOATS / greater(p.depth, 1)));
    p.splits = greater(1, smaller(MOST_SPLITS, c.vocab / SPLIT_COLUMNS));
    p.state = p.depth + 16;                                       // whole cache lines
    const int64_t own = c.threads * p.block * (GROUP + p.depth);  // see linear_softmax_of
    const int64_t affordable = (c.bytes / int64_t(sizeof(float)) - own) / (p.splits * p.state + c.width);
    p.rows = smaller(greater(affordable / GROUP, 1) * GROUP, (c.rows + GROUP - 1) / GROUP * GROUP);
    return p;
}

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

INLINE Running* running_of(float* state, int64_t depth) { return (Running*)(state + depth); }

// Products become powers relative to the rows' anchors, which rise where a larger product came.
static void powers_of_block(const LinearSoftmax& c, const LinearPlan& p, int64_t begin, int64_t count, int64_t rows,
                            float* z, float* states) {
    const float scale = float(LOG2E * c.scale);
    for (int64_t n = 0; n < rows; n += W) {
        F most = set1(-INFINITY);
        for (int64_t v = 0; v < count; v++) {
            if (c.bias) store(z + v * GROUP + n, load(z + v * GROUP + n) + set1(c.bias[begin + v]));
            most = larger(load(z + v * GROUP + n), most);
        }
        float lanes[W], subtrahend[W] = {};
        store(lanes, most);
        for (int i = 0; i < smaller(W, rows - n); i++) {
            float* total = states + (n + i) * p.state;
            Running* r = running_of(total, p.depth);
            if (lanes[i] > r->largest) {
                const double risen = double(scale) * lanes[i];
                const float factor = r->largest == -INFINITY ? 0 : float(exp2(r->anchor - risen));
                r->power_sum = factor == 0 ? 0 : factor * (r->power_sum + r->sum * (r->anchor - risen));
                r->sum *= factor, r->bias_sum *= factor, r->anchor = risen, r->largest = lanes[i];
                for (int64_t k = 0; k < p.depth; k += W) store(total + k, load(total + k) * set1(factor));
            }
            subtrahend[i] = r->largest == -INFINITY ? 0 : r->largest;  // nothing yet but -inf
        }
        const F factor = set1(scale), subtracted = load(subtrahend);
        for (int64_t begun = 0; begun < count; begun += CHAIN) {  // short sums in float, joined in double
            F sum = set1(0), power_sum = sum, bias_sum = sum;
            for (int64_t v = begun; v < smaller(begun + CHAIN, count); v++) {
                const F power = (load(z + v * GROUP + n) - subtracted) * factor, e = exponential2(power);
                store(z + v * GROUP + n, e);
                sum = sum + e;
                power_sum = fmadd(e, keep(not_below(e, set1(FLT_MIN)), power), power_sum);
                if (c.bias && c.bias[begin + v] != -INFINITY)
                    bias_sum = fmadd(e, set1(c.bias[begin + v] * BIAS_UNIT), bias_sum);
            }
            float power_lanes[W], bias_lanes[W];
            store(lanes, sum), store(power_lanes, power_sum), store(bias_lanes, bias_sum);
            for (int i = 0; i < smaller(W, rows - n); i++) {
                Running* r = running_of(states + (n + i) * p.state, p.depth);
                r->sum += lanes[i], r->power_sum += power_lanes[i], r->bias_sum += bias_lanes[i] / double(BIAS_UNIT);
            }
        }
    }
}

// The answers that lie in the block are noted and, where they are excluded, taken out.
static void take_answers(const LinearSoftmax& c, int64_t first_row, int64_t rows, int64_t begin, int64_t count,
                         float* z) {
    for (int64_t n = 0; n < rows; n++) {
        const int64_t ids[2] = {c.correct[first_row + n] - begin, c.wrong[first_row + n] - begin};
        for (int a = 0; a < 2; a++)
            if (ids[a] >= 0 && ids[a] < count)
                c.answers[2 * (first_row + n) + a] =
                    c.scale * (z[ids[a] * GROUP + n] + (c.bias ? c.bias[begin + ids[a]] : 0));
        for (int a = 0; a < 2 && c.exclude_answers; a++)  // afterwards: the two may be the same token
            if (ids[a] >= 0 && ids[a] < count) z[ids[a] * GROUP + n] = -INFINITY;
    }
}

// One group of rows against one split of the vocabulary.
template <class T>
static void run_split(const LinearSoftmax& c, const LinearPlan& p, int64_t split, int64_t first_row, int64_t rows,
                      const float* packed, float* states, float* memory) {
    const int64_t begin = c.vocab * split / p.splits, end = c.vocab * (split + 1) / p.splits;
    const bool direct = sizeof(T) == 4 && c.width == p.depth;
    float *z = memory, *copied = memory + p.block * GROUP;
    for (int64_t n = 0; n < rows; n++) {
        memset(states + n * p.state, 0, sizeof(float) * p.state);
        running_of(states + n * p.state, p.depth)->largest = -INFINITY;
    }
    for (int64_t v = begin; v < end; v += p.block) {
        const int64_t count = smaller(p.block, end - v);
        const T* from = at(c.weight, v * c.weight_stride, T());
        const float* w = (const float*)from;
        const int64_t stride = direct ? c.weight_stride : p.depth;
        if (!direct) {
            w = copied;
            for (int64_t i = 0; i < count; i++) {
                const T* row = from + i * c.weight_stride;
                int64_t k = 0;
                for (; k + W <= c.width; k += W) store(copied + i * p.depth + k, load(row + k));
                if (k < c.width) store(copied + i * p.depth + k, load_part(row + k, int(c.width - k), 0));
            }
        }
        if constexpr (in_pairs(T())) products_of_rows(from, c.weight_stride, count, rows, packed, c.width, z);
        else products_of_rows(w, stride, count, rows, packed, c.width, z);
        if (c.correct) take_answers(c, first_row, rows, v, count, z);
        powers_of_block(c, p, v, count, rows, z, states);
        int64_t k = 0;
        for (; k < p.depth; k += 2 * W)
            for (int64_t i = 0; i < count; i += ROWS_CHAIN) {
                const int64_t part = smaller(ROWS_CHAIN, count - i);
                const float *e = z + i * GROUP, *from_w = w + i * stride + k;
                if (k + W < p.depth) weighted_rows_of_group<2>(e, from_w, stride, part, rows, states + k, p.state);
                else weighted_rows_of_group<1>(e, from_w, stride, part, rows, states + k, p.state);
            }
    }
}

// The splits' sums of one row, joined in order.
template <class T>
static void join_splits(const LinearSoftmax& c, const LinearPlan& p, int64_t row, float* states, int64_t split_floats) {
    Running* r[MOST_SPLITS];
    double anchor = -INFINITY;
    for (int64_t s = 0; s < p.splits; s++) {
        r[s] = running_of(states + s * split_floats, p.depth);
        if (r[s]->largest > -INFINITY && r[s]->anchor > anchor) anchor = r[s]->anchor;
    }
    double sum = 0, power_sum = 0, bias_sum = 0;
    float factor[MOST_SPLITS];
    for (int64_t s = 0; s < p.splits; s++) {
        const double scale = r[s]->largest > -INFINITY ? exp2(r[s]->anchor - anchor) : 0;
        sum += scale * r[s]->sum, bias_sum += scale * r[s]->bias_sum;
        if (scale != 0) power_sum += scale * (r[s]->power_sum + r[s]->sum * (r[s]->anchor - anchor));
        factor[s] = float(scale);
    }
    if (sum == 0) {  // no column is kept
        memset(c.mean + row * c.width, 0, sizeof(float) * c.width);
        c.log_sum[row] = -INFINITY, c.mean_bias[row] = 0;
        return;
    }
    float* mean = c.mean + row * c.width;
    const F inverse = set1(float(1 / sum));
    for (int64_t k = 0; k < c.width; k += W) {
        F total = set1(0);
        for (int64_t s = 0; s < p.splits; s++)
            total = fmadd(set1(factor[s]), load(states + s * split_floats + k), total);
        const int n = int(smaller(W, c.width - k));
        n == W ? store(mean + k, total * inverse) : store_part(mean + k, total * inverse, n);
    }
    c.mean_bias[row] = bias_sum / sum;
    double dot = c.mean_bias[row];
    const T* hidden = at(c.hidden, row * c.hidden_stride, T());
    for (int64_t k = 0; k < c.width; k++) dot += double(widen(hidden[k])) * mean[k];
    c.log_sum[row] = LN2 * (log2(sum) - power_sum / sum) + double(c.scale) * dot;
}

template <class T>
static void linear_softmax_of(const LinearSoftmax& c) {
    const LinearPlan p = plan_of(c);
    const int64_t steps = in_pairs(T()) ? (c.width + 1) / 2 : c.width;  // of a product: h[k] or a pair of them
    const int64_t packed_floats = steps * GROUP, own = p.block * (GROUP + p.depth);
    for (int64_t first = 0; first < c.rows; first += p.rows) {
        const int64_t rows = smaller(p.rows, c.rows - first), groups = (rows + GROUP - 1) / GROUP;
        const int64_t split_floats = rows * p.state;
        const int threads = int(smaller(c.threads, groups * p.splits));
        float* states = scratch(p.splits * split_floats + groups * packed_floats + threads * own + 16);
        float *packed = states + p.splits * split_floats, *memory = packed + groups * packed_floats;
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < groups * steps; i++) {  // h[k][n], the rows that are not there 0
                const int64_t group = i / steps, k = i % steps;
                for (int64_t n = 0; n < GROUP; n++) {
                    const int64_t row = group * GROUP + n;
                    const T* hidden = at(c.hidden, (first + smaller(row, rows - 1)) * c.hidden_stride, T());
                    float* out = packed + i * GROUP + n;
                    if (row >= rows) *out = 0;
                    else if constexpr (in_pairs(T())) store_pair(out, hidden, k, c.width);
                    else *out = widen(hidden[k]);
                }
            }
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < groups * p.splits; i++) {
                const int64_t split = i / groups, row = i % groups * GROUP;
                run_split<T>(c, p, split, first + row, smaller(GROUP, rows - row), packed + i % groups * packed_floats,
                             states + split * split_floats + row * p.state, memory + thread_index() * own);
            }
#pragma omp for schedule(static)
            for (int64_t n = 0; n < rows; n++) join_splits<T>(c, p, first + n, states + n * p.state, split_floats);
        }
    }
}

#if !defined(ACTSCALE_BF16_PAIRS)  // where there are pairs, another level serves the other types
static void linear_softmax(const LinearSoftmax& c) {
    with_type(c.type, [&](auto zero) { linear_softmax_of<decltype(zero)>(c); });
}
#endif

}  // namespace ACTSCALE_LEVEL
}  // namespace actscale
