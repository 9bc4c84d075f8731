// The softmax over a vocabulary and its mean of the rows of W, straight from hidden states: attention with K = V = W.
//
//   z = s·(W·h + b),  q = softmax(z) over the columns that are kept
//   log_sum = log Σ exp(z),  mean = Σ q·W (d floats a row),  mean_bias = Σ q·b,  answers = z at the two answers
//
// W is read from memory once. A block of its rows (BLOCK_FLOATS, in L2 from then on) is multiplied with up to GROUP
// hidden states, the products become powers of two relative to a running maximum, and these weight the same block's
// rows: 4·N·V·d operations, compute-bound from about 8 rows on. No [N, V] exists; beside the results there are a block
// of products a thread and d + 4 floats a row and split.
//
// V is cut into splits by its size alone, their sums are joined in order, and a row's products and sums run over the
// same lanes in the same order whatever rows stand beside it: every number of threads and every batch give the same
// bits. That makes the KL divergence of a row to itself exactly 0.
#pragma once
#include "intervention_loss.h"

namespace actscale {
namespace ACTSCALE_LEVEL {

constexpr int64_t GROUP = 64;               // rows whose products are made together
constexpr int64_t BLOCK_FLOATS = 96 << 10;  // of W: 384 KiB, which leaves room in an L2 of 512 KiB for the products
constexpr int64_t KEPT_FLOATS = 4 << 20;    // of scratch, for the next call
constexpr int64_t SPLIT_COLUMNS = 4096, MOST_SPLITS = 16;
#if defined(ACTSCALE_AVX512)
constexpr int TILE = 12;  // rows of a register tile, two vectors wide: 24 of 32 registers
#elif defined(ACTSCALE_AVX2)
constexpr int TILE = 6;
#else
constexpr int TILE = 4;
#endif

struct LinearPlan {
    int64_t block, splits, depth, rows;  // columns a block; d padded to whole vectors; rows at a time
    int64_t state;                       // floats a row and split: the sum of W's rows, then `Running`
};

struct Running { double sum, bias_sum, anchor; float largest; };  // of one row in one split

static LinearPlan plan_of(const LinearSoftmax& c) {
    LinearPlan p;
    p.depth = (c.width + W - 1) / W * W;
    p.block = greater(16, smaller(256, BLOCK_FLOATS / greater(p.depth, 1)));
    p.splits = greater(1, smaller(MOST_SPLITS, c.vocab / SPLIT_COLUMNS));
    p.state = p.depth + 16;  // whole cache lines
    const int64_t affordable = c.bytes / int64_t(sizeof(float)) / (p.splits * p.state);
    p.rows = smaller(greater(affordable / GROUP, 1) * GROUP, (c.rows + GROUP - 1) / GROUP * GROUP);
    return p;
}

// z[i][n] = Σ_k w[i][k]·h[k][n] for M rows of W and C vectors of hidden states.
template <int M, int C>
INLINE void products(const float* w, int64_t stride, const float* h, int64_t depth, float* z) {
    F sums[M][C];
#pragma GCC unroll 16
    for (int i = 0; i < M; i++)
        for (int j = 0; j < C; j++) sums[i][j] = set1(0);
    for (int64_t k = 0; k < depth; k++) {
        F lanes[C];
        for (int j = 0; j < C; j++) lanes[j] = load(h + k * GROUP + j * W);
#pragma GCC unroll 16
        for (int i = 0; i < M; i++) {
            const F weight = set1(w[i * stride + k]);
            for (int j = 0; j < C; j++) sums[i][j] = fmadd(weight, lanes[j], sums[i][j]);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < M; i++)
        for (int j = 0; j < C; j++) store(z + i * GROUP + j * W, sums[i][j]);
}

// sums[i][k] += Σ_v e[v][i]·w[v][k] for M rows and C vectors of columns k.
template <int M, int C>
INLINE void weighted_rows(const float* e, const float* w, int64_t stride, int64_t count, float* sums, int64_t state) {
    F total[M][C];
#pragma GCC unroll 16
    for (int i = 0; i < M; i++)
        for (int j = 0; j < C; j++) total[i][j] = load(sums + i * state + j * W);
    for (int64_t v = 0; v < count; v++) {
        F row[C];
        for (int j = 0; j < C; j++) row[j] = load(w + v * stride + j * W);
#pragma GCC unroll 16
        for (int i = 0; i < M; i++) {
            const F weight = set1(e[v * GROUP + i]);
            for (int j = 0; j < C; j++) total[i][j] = fmadd(weight, row[j], total[i][j]);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < M; i++)
        for (int j = 0; j < C; j++) store(sums + i * state + j * W, total[i][j]);
}

template <int C>
static void products_of_block(const float* w, int64_t stride, int64_t count, const float* h, int64_t depth, float* z) {
    int64_t v = 0;
    for (; v + TILE <= count; v += TILE) products<TILE, C>(w + v * stride, stride, h, depth, z + v * GROUP);
    for (; v < count; v++) products<1, C>(w + v * stride, stride, h, depth, z + v * GROUP);
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
        F most = set1(-FLT_MAX);
        for (int64_t v = 0; v < count; v++) {
            if (c.bias) store(z + v * GROUP + n, load(z + v * GROUP + n) + set1(c.bias[begin + v]));
            most = larger(load(z + v * GROUP + n), most);
        }
        float largest[W], subtrahend[W], sums[W], bias_sums[W];
        store(largest, most);
        for (int i = 0; i < W; i++) subtrahend[i] = 0;
        for (int64_t i = 0; i < smaller(W, rows - n); i++) {
            Running* r = running_of(states + (n + i) * p.state, p.depth);
            if (largest[i] > r->largest) {
                const double risen = Anchor(largest[i], scale).value;
                const float factor = r->largest == -FLT_MAX ? 0 : float(exp2(r->anchor - risen));
                r->sum *= factor, r->bias_sum *= factor, r->anchor = risen, r->largest = largest[i];
                float* total = states + (n + i) * p.state;
                for (int64_t k = 0; k < p.depth && c.mean; k += W) store(total + k, load(total + k) * set1(factor));
            }
            subtrahend[i] = FUSED ? float(r->anchor) : r->largest;
        }
        const F factor = set1(scale), subtracted = load(subtrahend);
        F sum = set1(0), bias_sum = sum;
        for (int64_t v = 0; v < count; v++) {
            const F raw = load(z + v * GROUP + n);
            const F e = exponential2(FUSED ? fmsub(raw, factor, subtracted) : (raw - subtracted) * factor);
            store(z + v * GROUP + n, e);
            sum = sum + e;
            if (c.bias && c.bias[begin + v] > -FLT_MAX) bias_sum = fmadd(e, set1(c.bias[begin + v]), bias_sum);
        }
        store(sums, sum), store(bias_sums, bias_sum);
        for (int64_t i = 0; i < smaller(W, rows - n); i++) {
            Running* r = running_of(states + (n + i) * p.state, p.depth);
            r->sum += sums[i], r->bias_sum += bias_sums[i];
        }
    }
}

// The answers that lie in the block are noted and, where they are excluded, taken out.
static void take_answers(const LinearSoftmax& c, int64_t first_row, int64_t rows, int64_t begin, int64_t count,
                         float* z) {
    for (int64_t n = 0; n < rows; n++)
        for (int a = 0; a < 2; a++) {
            const int64_t v = (a ? c.wrong : c.correct)[first_row + n] - begin;
            if (v < 0 || v >= count) continue;
            c.answers[2 * (first_row + n) + a] = c.scale * (z[v * GROUP + n] + (c.bias ? c.bias[begin + v] : 0));
            if (c.exclude_answers) z[v * GROUP + n] = -INFINITY;
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
        running_of(states + n * p.state, p.depth)->largest = -FLT_MAX;
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
        for (int64_t n = 0; n < rows; n += 2 * W) {
            if (rows - n > W) products_of_block<2>(w, stride, count, packed + n, c.width, z + n);
            else products_of_block<1>(w, stride, count, packed + n, c.width, z + n);
        }
        if (c.correct) take_answers(c, first_row, rows, v, count, z);
        powers_of_block(c, p, v, count, rows, z, states);
        if (!c.mean) continue;
        int64_t k = 0;
        for (; k + 2 * W <= p.depth; k += 2 * W)
            weighted_rows_of_group<2>(z, w + k, stride, count, rows, states + k, p.state);
        if (k < p.depth) weighted_rows_of_group<1>(z, w + k, stride, count, rows, states + k, p.state);
    }
}

// The splits' sums of one row, joined in order.
static void join_splits(const LinearSoftmax& c, const LinearPlan& p, int64_t row, float* states, int64_t split_floats) {
    Running* r[MOST_SPLITS];
    double anchor = -INFINITY, largest = 0;
    for (int64_t s = 0; s < p.splits; s++) {
        r[s] = running_of(states + s * split_floats, p.depth);
        if (r[s]->largest > -FLT_MAX && r[s]->anchor > anchor) anchor = r[s]->anchor, largest = r[s]->largest;
    }
    double sum = 0, bias_sum = 0;
    float factor[MOST_SPLITS];
    for (int64_t s = 0; s < p.splits; s++) {
        const double scale = r[s]->largest > -FLT_MAX ? exp2(r[s]->anchor - anchor) : 0;
        sum += scale * r[s]->sum, bias_sum += scale * r[s]->bias_sum;
        factor[s] = float(scale);
    }
    // What float rounds off log2(e)·s moves all powers by the same amount, up to 1e-8 of their spread.
    const double rounded = double(float(LOG2E * c.scale)), exact = LOG2E * double(c.scale);
    c.log_sum[row] = sum == 0 ? -INFINITY : LN2 * (anchor + log2(sum) + (exact - rounded) * largest);
    if (!c.mean) return;
    c.mean_bias[row] = sum == 0 ? 0 : bias_sum / sum;
    float* mean = c.mean + row * c.width;
    const float inverse = sum == 0 ? 0 : float(1 / sum);
    for (int64_t k = 0; k < c.width; k += W) {
        F total = set1(0);
        for (int64_t s = 0; s < p.splits; s++)
            total = fmadd(set1(factor[s]), load(states + s * split_floats + k), total);
        const int n = int(smaller(W, c.width - k));
        n == W ? store(mean + k, total * set1(inverse)) : store_part(mean + k, total * set1(inverse), n);
    }
}

template <class T>
static void linear_softmax_of(const LinearSoftmax& c) {
    const LinearPlan p = plan_of(c);
    const int64_t packed_floats = c.width * GROUP, own = p.block * (GROUP + p.depth);
    for (int64_t first = 0; first < c.rows; first += p.rows) {
        const int64_t rows = smaller(p.rows, c.rows - first), groups = (rows + GROUP - 1) / GROUP;
        const int64_t split_floats = rows * p.state;
        const int threads = int(smaller(c.threads, groups * p.splits));
        float* states = scratch(p.splits * split_floats + groups * packed_floats + threads * own + 16);
        float *packed = states + p.splits * split_floats, *memory = packed + groups * packed_floats;
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < groups * c.width; i++) {  // h[k][n], the rows that are not there 0
                const int64_t group = i / c.width, k = i % c.width;
                for (int64_t n = 0; n < GROUP; n++) {
                    const int64_t row = group * GROUP + n;
                    packed[i * GROUP + n] =
                        row < rows ? widen(*at(c.hidden, (first + row) * c.hidden_stride + k, T())) : 0.0f;
                }
            }
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < groups * p.splits; i++) {  // a split's groups one after another: its W is at hand
                const int64_t split = i / groups, row = i % groups * GROUP;
                run_split<T>(c, p, split, first + row, smaller(GROUP, rows - row), packed + i % groups * packed_floats,
                             states + split * split_floats + row * p.state, memory + thread_index() * own);
            }
#pragma omp for schedule(static)
            for (int64_t n = 0; n < rows; n++) join_splits(c, p, first + n, states + n * p.state, split_floats);
        }
    }
    release_scratch(KEPT_FLOATS);
}

static void linear_softmax(const LinearSoftmax& c) {
    if (c.type == Type::float32) linear_softmax_of<float>(c);
    else if (c.type == Type::bfloat16) linear_softmax_of<bf16>(c);
    else linear_softmax_of<half>(c);
}

}  // namespace ACTSCALE_LEVEL
}  // namespace actscale
