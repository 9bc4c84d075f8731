// The softmax over a vocabulary and its mean of the rows of W, straight from hidden states: attention with K = V = W.
//
//   z = s·(W·h + b),  q = softmax(z) over the columns that are kept
//   log_sum = log Σ exp(z),  mean = Σ q·W (d floats per row),  mean_bias = Σ q·b,  answers = z at the two answers
//
// A KL divergence is a small difference of log_sums, and the products' roundings δ move a plain one by Σ q·δ. Therefore
// log_sum is put together as H(q) + s·(h·mean + mean_bias), which is stationary in q: errors of q enter squared.
//
// W is read from memory once for every GROUP rows. A block of W, in L2 from then on, is multiplied with the hidden
// states, the products become powers of two relative to a running maximum, and these weight the same block's rows:
// 4·N·V·d operations. No [N, V] exists; beside the results there are a block of products a thread and d + 16 floats per
// row and split, for GROUP rows or as many as `bytes` allows.
//
// V is cut into splits by its size alone, their sums are joined in order, and a row's products and sums run over the
// same lanes in the same order whatever rows stand beside it: every number of threads and every batch give the same
// bits. That makes the KL divergence of a row to itself exactly 0.
//
// How a block is multiplied, `Products`, is the including file's: by vectors (linear_softmax.h), by tiles
// (linear_softmax_tiles.h).
#pragma once
#include "loss_blocks.h"

namespace actscale {
namespace ACTSCALE_LEVEL {

constexpr int64_t GROUP = 64;  // rows whose products are made together
// A chain of additions rounds as often as it is long. An error of Σ e moves log_sum by itself times h·mean.
constexpr int64_t CHAIN = 16;
constexpr float BIAS_UNIT = 0x1p-8f;  // a chain of biases at the least float, which masks a token, stays in range
constexpr int64_t SPLIT_COLUMNS = 4096, MOST_SPLITS = 16;

struct LinearPlan {
    int64_t block, splits, depth, rows;  // columns per block; d padded as the products need it; rows at a time
    int64_t state;                       // floats per row and split: the sum of W's rows, then `Running`
};

struct Running {
    double sum, power_sum, bias_sum, anchor;
    float largest;
};  // of one row in one split

INLINE Running* running_of(float* state, int64_t depth) { return (Running*)(state + depth); }

// `own`: floats of a thread's memory; `packed`: those of a row of hidden states.
static LinearPlan plan_of(const LinearSoftmax& c, int64_t block, int64_t depth, int64_t own, int64_t packed) {
    LinearPlan p;
    p.block = block, p.depth = depth;
    p.splits = greater(1, smaller(MOST_SPLITS, c.vocab / SPLIT_COLUMNS));
    p.state = depth + 16;  // whole cache lines
    const int64_t affordable = (c.bytes / int64_t(sizeof(float)) - c.threads * own) / (p.splits * p.state + packed);
    p.rows = smaller(greater(affordable / GROUP, 1) * GROUP, (c.rows + GROUP - 1) / GROUP * GROUP);
    return p;
}

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
template <class Products>
static void run_split(const LinearSoftmax& c, const LinearPlan& p, const Products& products, int64_t split,
                      int64_t first_row, int64_t rows, const float* packed, float* states, float* memory) {
    const int64_t begin = c.vocab * split / p.splits, end = c.vocab * (split + 1) / p.splits;
    float *z = memory, *own = memory + p.block * GROUP;
    for (int64_t n = 0; n < rows; n++) {
        memset(states + n * p.state, 0, sizeof(float) * p.state);
        running_of(states + n * p.state, p.depth)->largest = -INFINITY;
    }
    for (int64_t v = begin; v < end; v += p.block) {
        const int64_t count = smaller(p.block, end - v);
        products.multiply(v, count, rows, packed, z, own);
        if (c.correct) take_answers(c, first_row, rows, v, count, z);
        powers_of_block(c, p, v, count, rows, z, states);
        products.add_rows(v, count, rows, z, states, p.state, own);
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

// Products:
//   block, depth              columns per block, and d as it is padded
//   steps, group_floats       of packing the hidden states of a group, and what they take
//   own_floats                memory of a thread
//   pack(step, first, rows, packed)         the step's part of the rows from `first` on, the missing ones as 0
//   multiply(v, count, rows, packed, z, own)        z[i][n] = W[v + i]·h[n]
//   add_rows(v, count, rows, e, states, state, own)  states[n] += Σ_i e[i][n]·W[v + i]
//   Thread                    an object that each thread holds meanwhile
template <class T, class Products>
static void linear_softmax_by(const LinearSoftmax& c) {
    const Products products(c);
    const int64_t own = products.block * GROUP + products.own_floats;
    const LinearPlan p = plan_of(c, products.block, products.depth, own, products.group_floats / GROUP);
    for (int64_t first = 0; first < c.rows; first += p.rows) {
        const int64_t rows = smaller(p.rows, c.rows - first), groups = (rows + GROUP - 1) / GROUP;
        const int64_t split_floats = rows * p.state;
        const int threads = int(smaller(c.threads, groups * p.splits));
        float* states = scratch(p.splits * split_floats + groups * products.group_floats + threads * own + 16);
        float *packed = states + p.splits * split_floats, *memory = packed + groups * products.group_floats;
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
            const typename Products::Thread held;
            (void)held;
#pragma omp for schedule(static)
            for (int64_t i = 0; i < groups * products.steps; i++) {
                const int64_t row = i / products.steps * GROUP;
                products.pack(i % products.steps, first + row, smaller(GROUP, rows - row),
                              packed + i / products.steps * products.group_floats);
            }
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < groups * p.splits; i++) {
                const int64_t split = i / groups, row = i % groups * GROUP;
                run_split(c, p, products, split, first + row, smaller(GROUP, rows - row),
                          packed + i % groups * products.group_floats, states + split * split_floats + row * p.state,
                          memory + thread_index() * own);
            }
#pragma omp for schedule(static)
            for (int64_t n = 0; n < rows; n++) join_splits<T>(c, p, first + n, states + n * p.state, split_floats);
        }
    }
}

}  // namespace ACTSCALE_LEVEL
}  // namespace actscale
