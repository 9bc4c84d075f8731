// Hinge, KL divergence and the gradient of the logits, one read of each logit from memory.
//
//   x = c·(r - R),  y = c·(z - Z),  c = t·log2(e),  p = 2^x/Sr,  q = 2^y/Sz,     t: the inverse temperature
//   forward  F = ln2·(Σ p·(x - y) + log2(Sz/Sr))    dF/dz = t·(q - p)
//   reverse  F = Σ q·d - ln2·log2(Sz/Sr)            dF/dz = t·q·(d - ln2·log2(Sz/Sr) - F),  d = t·((z - Z) - (r - R))
//   hinge    E = max(0, m - s·(z[c] - z[w]))        dE/dz[c] = -s, dE/dz[w] = s, where positive
//   with answers on request: weights w_E, w_F of rows in the gradient alone, that of w_E·E + w_F·F
//   without answers on request: weights of rows, w·F and w·dF/dz; a soft-cap u(z), u(r), whose slope du/dz the gradient
//   takes as a factor
//
// A row is cut into blocks with anchors R, Z of their own. Any anchor gives the same result as long as no power
// overflows, so a block takes the largest of its first SAMPLE logits; only where its sums then turn out large or not
// finite is it done again, with its maximum and with the masks that -inf needs.
// Pass 1, block by block: both powers, the sums, and a float per logit into scratch: 2^y (reverse: and d). The blocks'
// sums are joined in double, in order. Pass 2 reads the scratch and r, still in cache, makes 2^x again (cheaper than to
// keep it: 1.28 vs 1.37 ms), asks for the next row meanwhile (1.16 ms) and writes the gradient. From memory a logit
// costs three elements: z, r and the gradient. No block knows of another, so rows can be split over threads, and every
// number of threads gives the same bits. A row of weight 0 is not read: a thread that comes upon it writes its zeros.
// With a soft-cap pass 1 works on a capped copy of the block, in the cache of the first level, and keeps both sides'
// powers times the slope (reverse: one, and the difference), two floats per logit; pass 2 then reads no logit.
//
// With z equal to r bit for bit, x = y, Sz = Sr and both scales agree: F and every difference are exactly 0. This needs
// multiplications that are not contracted into the subtraction (-ffp-contract=off).
#pragma once
#include "l1_norm.h"
#include "loss_blocks.h"

namespace actscale {
namespace ACTSCALE_LEVEL {

constexpr int64_t STREAM_BYTES = 4 << 20;    // larger gradients bypass the cache (64 x 49152: 1.2 vs 1.4 ms)
constexpr int64_t SERIAL_LOGITS = 16 << 10;  // less than this is done before a second thread has woken up

struct Row {
    double z_anchor, r_anchor, log_ratio, z_sum, r_sum, divergence;
    float difference;
};

INLINE float weight_of(const InterventionLoss& c, int64_t row) { return c.row_weight ? c.row_weight[row] : 1.0f; }
// Of the faithfulness in the gradient.
INLINE float gradient_weight_of(const InterventionLoss& c, int64_t row) {
    return c.gradient_weight ? c.gradient_weight[2 * row + 1] : weight_of(c, row);
}
INLINE bool skipped(const InterventionLoss& c, int64_t row) { return weight_of(c, row) == 0; }

INLINE bool nothing_left(const InterventionLoss& c) {
    return c.vocab == 0 || (c.exclude_answers && c.correct && c.vocab <= 2);
}

// The sums of row n from those of its blocks, its divergence, and z[c] - z[w], which a gradient in place overwrites.
template <class T>
static Row join(const InterventionLoss& c, int64_t n, const Block* blocks, int64_t count) {
    Row row = {-FLT_MAX, -FLT_MAX, 0, 0, 0, 0, 0};
    const double scale = scale_of(c);
    const T* z = at(c.logits, n * c.logits_stride, T());
    if (c.correct) row.difference = widen(z[c.correct[n]]) - widen(z[c.wrong[n]]);
    for (int64_t j = 0; j < count; j++) {
        row.z_anchor = blocks[j].z_anchor > row.z_anchor ? blocks[j].z_anchor : row.z_anchor;
        row.r_anchor = blocks[j].r_anchor > row.r_anchor ? blocks[j].r_anchor : row.r_anchor;
    }
    double weighted = 0;
    for (int64_t j = 0; j < count; j++) {
        const Block& b = blocks[j];
        const double dz = scale * (double(b.z_anchor) - row.z_anchor), dr = scale * (double(b.r_anchor) - row.r_anchor);
        const double z_scale = exp2(dz), r_scale = exp2(dr);
        row.z_sum += z_scale * b.z_sum, row.r_sum += r_scale * b.r_sum;
        const double factor = c.reverse ? z_scale : r_scale, sum = c.reverse ? b.z_sum : b.r_sum;
        if (factor * sum != 0)  // NaN takes part
            weighted += factor * (b.weighted + sum * (c.reverse ? LN2 * (dz - dr) : dr - dz));
    }
    row.log_ratio = log2(row.z_sum / row.r_sum);
    if (c.reverse) row.divergence = weighted / row.z_sum - LN2 * row.log_ratio;
    else row.divergence = LN2 * (weighted / row.r_sum + row.log_ratio);
    if (row.divergence < 0) row.divergence = 0;  // rounding
    if (nothing_left(c)) row.divergence = 0;
    return row;
}

// What turns powers into the gradient: forward a·2^y - b·2^x; reverse a·2^y·(d + b), where a is not 0.
struct Scales {
    float a, b;
};
static Scales scales_of(const InterventionLoss& c, int64_t n, const Row& row, const Block& block) {
    if (nothing_left(c)) return {0, 0};
    const double t = double(c.inverse_temperature) * gradient_weight_of(c, n), scale = scale_of(c);
    const double dz = scale * (double(block.z_anchor) - row.z_anchor),
                 dr = scale * (double(block.r_anchor) - row.r_anchor);
    const double a = exp2(dz) * t / row.z_sum;
    if (c.reverse) return {float(a), float(LN2 * (dz - dr - row.log_ratio) - row.divergence)};
    return {float(a), float(exp2(dr) * t / row.r_sum)};
}

template <bool REVERSE> INLINE F gradient(F power, F other, F a, F b) {
    // A block far below the row's maximum has weight 0, and differences that may be infinite. NaN stays.
    if (REVERSE) {
        const F value = keep(not_below(absolute(a), set1(FLT_TRUE_MIN)), power * a * (other + b));
        return keep(not_below(power, set1(FLT_MIN)), value);
    }
    return power * a - other * b;
}

// `count` gradients: `whole(i)` is a vector of them, `part(i, n)` writes n.
template <class T, class Whole, class Part>
INLINE void write(T* grad, int64_t count, bool streamed, Whole whole, Part part) {
    int64_t i = 0;
    if (streamed) {
        const int64_t bytes = W * sizeof(T), head = (bytes - (uintptr_t)grad % bytes) % bytes / sizeof(T);
        if (head && head <= count) part(0, int(head)), i = head;
        for (; i + W <= count; i += W) stream(grad + i, whole(i));
    } else {
        for (; i + W <= count; i += W) store(grad + i, whole(i));
    }
    if (i < count) part(i, int(count - i));
}

// `next_z`, `next_r`: what to bring into the cache meanwhile, where the gradient bypasses it.
template <class T, bool REVERSE, bool CAPPED>
INLINE void second_pass(const float* first, const float* second, const T* r, const Powers& r_powers, int64_t count,
                        Scales s, T* grad, bool streamed, const T* next_z, const T* next_r) {
    constexpr bool KEPT = KEEPS_BOTH || REVERSE || CAPPED;
    const F a = set1(s.a), b = set1(s.b);
    auto whole = [&](int64_t i) __attribute__((always_inline)) {
        if (streamed) __builtin_prefetch(next_z + i, 0, 2), __builtin_prefetch(next_r + i, 0, 2);
        const F other = KEPT ? load(second + i) : exponential2(r_powers.of(load(r + i)));
        return gradient<REVERSE>(load(first + i), other, a, b);
    };
    auto part = [&](int64_t i, int n) __attribute__((always_inline)) {
        const F other = KEPT ? load_part(second + i, n, 0) : exponential2(r_powers.of(load_part(r + i, n, -INFINITY)));
        store_part(grad + i, gradient<REVERSE>(load_part(first + i, n, 0), other, a, b), n);
    };
    write(grad, count, streamed, whole, part);
}

// What is left to write of row n in the columns from `begin` on, where its weight is 0.
template <class T> static void write_zeros(const InterventionLoss& c, int64_t n, int64_t begin, int64_t count,
                                           bool streamed) {
    T* grad = (T*)c.grad + n * c.vocab + begin;
    auto part = [&](int64_t i, int n) __attribute__((always_inline)) { store_part(grad + i, set1(0), n); };
    write(grad, count, streamed, [](int64_t) __attribute__((always_inline)) { return set1(0); }, part);
}

// The two losses of the row and the gradient's answer columns, after the row's second pass.
template <class T, bool REVERSE>
static void finish(const InterventionLoss& c, int64_t n, const Row& row, const Block* blocks, const float* first,
                   const float* second) {
    c.faithfulness[n] = skipped(c, n) ? 0.0f : float(weight_of(c, n) * row.divergence);
    float* out = c.grad ? c.answer_grad + 3 * n : nullptr;
    if (!c.correct) {
        c.effectiveness[n] = 0;
        if (out) out[0] = out[1] = out[2] = 0;
        return;
    }
    const int64_t answers[2] = {c.correct[n], c.wrong[n]};
    const float hinge = c.margin - c.direction[n] * row.difference;
    c.effectiveness[n] = hinge <= 0 ? 0 : hinge;  // NaN stays
    if (!out) return;
    out[2] = hinge > 0 ? -c.direction[n] : 0.0f;
    if (c.gradient_weight) out[2] *= c.gradient_weight[2 * n];
    T* grad = (T*)c.grad + n * c.vocab;
    for (int a = 0; a < 2; a++) {
        const int64_t i = answers[a];
        const Scales s = scales_of(c, n, row, blocks[i / BLOCK]);
        const T* r = at(c.reference, n * c.reference_stride + i, T());
        const Powers r_powers(blocks[i / BLOCK].r_anchor, scale_of(c));
        const F other = KEEPS_BOTH || REVERSE ? set1(second[i]) : exponential2(r_powers.of(set1(widen(*r))));
        float value[W];
        store(value, gradient<REVERSE>(set1(first[i]), other, set1(s.a), set1(s.b)));
        out[a] = c.exclude_answers ? 0.0f : value[0];
        narrow(out[a] + (a ? -out[2] : out[2]), grad + i);
    }
}

template <class T, bool REVERSE, bool STORE, bool CAPPED>
static void run(const InterventionLoss& c) {
    const int64_t blocks = (c.vocab + BLOCK - 1) / BLOCK, logits = c.rows * c.vocab;
    const int64_t width = STORE ? padded(c.vocab) : 0;
    const int threads = logits < SERIAL_LOGITS ? 1 : int(smaller(c.threads, c.rows * blocks));
    const bool streamed = logits * int64_t(sizeof(T)) >= STREAM_BYTES;
    const int64_t block_floats = padded(blocks * int64_t(sizeof(Block) / sizeof(float)));
    // Few rows: their blocks are dealt out, with a barrier after each pass. Many: each thread takes whole rows.
    const bool split = threads > 1 && c.rows < 4 * threads;
    const int64_t slots = split ? c.rows : threads, slot = (KEEPS_BOTH || REVERSE || CAPPED ? 2 : 1) * width + block_floats;
    float* memory = scratch(slots * (slot + 16));
    auto first_of = [&](int64_t s) { return memory + s * slot; };
    auto blocks_of = [&](int64_t s) { return (Block*)(memory + (s + 1) * slot - block_floats); };
    Row* joined = (Row*)(memory + slots * slot);
    auto pass1 = [&](int64_t row, int64_t j, int64_t s) {
        float* first = first_of(s) + j * BLOCK;
        if constexpr (CAPPED)
            first_pass_capped<T, REVERSE, STORE>(c, row, j * BLOCK, first, first + width, blocks_of(s) + j);
        else first_pass_of<T, REVERSE, STORE>(c, row, j * BLOCK, first, first + width, blocks_of(s) + j);
    };
    auto pass2 = [&](int64_t row, int64_t j, int64_t s, const Row& sums, int64_t next) {
        const float* first = first_of(s) + j * BLOCK;
        const int64_t begin = j * BLOCK, count = smaller(BLOCK, c.vocab - begin);
        const Block& block = blocks_of(s)[j];
        second_pass<T, REVERSE, CAPPED>(first, first + width, at(c.reference, row * c.reference_stride + begin, T()),
                                        Powers(block.r_anchor, scale_of(c)), count, scales_of(c, row, sums, block),
                                        (T*)c.grad + row * c.vocab + begin, streamed,
                                        at(c.logits, next * c.logits_stride + begin, T()),
                                        at(c.reference, next * c.reference_stride + begin, T()));
    };
    auto finish_row = [&](int64_t row, int64_t s, const Row& sums) {
        finish<T, REVERSE>(c, row, sums, blocks_of(s), first_of(s), first_of(s) + width);
    };
    int64_t claimed = 0;
    auto claim = [&] {  // a row that no other thread takes, and that has a weight
        for (;;) {
            int64_t row;
#pragma omp atomic capture
            row = claimed++;
            if (row >= c.rows || !skipped(c, row)) return row;
            if (STORE) write_zeros<T>(c, row, 0, c.vocab, streamed);
            finish_row(row, 0, {});
        }
    };
    if (threads == 1 || !split) {
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
            const int s = thread_index();
            for (int64_t row = claim(), next; row < c.rows; row = next) {
                for (int64_t j = 0; j < blocks; j++) pass1(row, j, s);
                next = claim();
                const Row sums = join<T>(c, row, blocks_of(s), blocks);
                if (STORE)
                    for (int64_t j = 0; j < blocks; j++) pass2(row, j, s, sums, next < c.rows ? next : row);
                finish_row(row, s, sums);
            }
            if (streamed) fence();
        }
        return;
    }
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < c.rows * blocks; i++)
            if (!skipped(c, i / blocks)) pass1(i / blocks, i % blocks, i / blocks);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < c.rows; row++)
            if (!skipped(c, row)) joined[row] = join<T>(c, row, blocks_of(row), blocks);
        if (STORE) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < c.rows * blocks; i++) {
                const int64_t row = i / blocks, begin = i % blocks * BLOCK;
                if (skipped(c, row)) write_zeros<T>(c, row, begin, smaller(BLOCK, c.vocab - begin), streamed);
                else pass2(row, i % blocks, row, joined[row], row);
            }
        }
        if (streamed) fence();
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t row = 0; row < c.rows; row++) finish_row(row, row, joined[row]);
    }
}

template <bool REVERSE, class T> static void run_for(const InterventionLoss& c, T) {
    if (c.softcap > 0) c.grad ? run<T, REVERSE, true, true>(c) : run<T, REVERSE, false, true>(c);
    else c.grad ? run<T, REVERSE, true, false>(c) : run<T, REVERSE, false, false>(c);
}

static void intervention_loss(const InterventionLoss& c) {
    with_type(c.type, [&](auto zero) { c.reverse ? run_for<true>(c, zero) : run_for<false>(c, zero); });
    if (c.l1) l1_norm(c.scalars, c.sign, c.l1, c.n_scalars);
}

}  // namespace ACTSCALE_LEVEL
}  // namespace actscale
