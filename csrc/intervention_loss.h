// Hinge, KL divergence and the gradient of the logits, one read of each logit from memory.
//
//   x = (r - max r)·t,  y = (z - max z)·t,  p = exp(x)/Sr,  q = exp(y)/Sz,     t: the inverse temperature
//   forward  F = Σ p·(x - y) + log(Sz/Sr)         dF/dz = t·(q - p)
//   reverse  F = Σ q·(y - x) - log(Sz/Sr)         dF/dz = t·q·(y - x - log(Sz/Sr) - F)
//   hinge    E = max(0, m - s·(z[c] - z[w]))      dE/dz[c] = -s, dE/dz[w] = s, where positive
//
// A row is cut into blocks. Pass 1, block by block: the two maxima of the block, then both exponentials relative to
// them, the sums, and two floats a logit into scratch: exp(y), and exp(x) or y - x. The blocks' sums are joined in
// double, in order. Pass 2 reads the scratch, still in cache, and writes the gradient. A logit costs one exp on each
// side and, from memory, three elements: z, r and the gradient. No block knows of another, so rows can be split over
// threads, and every number of threads gives the same bits.
//
// With z equal to r bit for bit, x = y, Sz = Sr and both scales agree: F and every difference are exactly 0. This needs
// multiplications that are not contracted into the subtraction (-ffp-contract=off).
#pragma once
#include "kernels.h"
#include "simd.h"

namespace actscale {
namespace ACTSCALE_LEVEL {

constexpr int64_t BLOCK = 2048;                  // two rows of it and their scratch: 32 KiB
constexpr int64_t STREAM_BYTES = 4 << 20;        // larger gradients bypass the cache (64 x 49152: 1.2 vs 1.4 ms)
constexpr int64_t SERIAL_LOGITS = 16 << 10;      // less than this is done before a second thread has woken up

struct Block { float z_max, r_max; float z_sum, r_sum, weighted; };
struct Row { double z_max, r_max, log_ratio, z_sum, r_sum, divergence; };

INLINE const float* at(const void* p, int64_t i, float) { return (const float*)p + i; }
INLINE const bf16* at(const void* p, int64_t i, bf16) { return (const bf16*)p + i; }
INLINE const half* at(const void* p, int64_t i, half) { return (const half*)p + i; }
INLINE float minus_infinity(float) { return -INFINITY; }
INLINE bf16 minus_infinity(bf16) { return {0xff80}; }
INLINE half minus_infinity(half) { return {0xfc00}; }

INLINE int64_t padded(int64_t count) { return (count + 15) / 16 * 16; }

template <class T, bool REVERSE, bool STORE>
INLINE void first_pass(const T* z, const T* r, int64_t count, float t, float* first, float* second, Block* block) {
    const int64_t whole = count / W * W;
    const int rest = int(count - whole);
    F z_max = set1(-FLT_MAX), r_max = z_max, z_max2 = z_max, r_max2 = z_max;
    int64_t i = 0;
    for (; i + 2 * W <= whole; i += 2 * W) {
        z_max = larger(load(z + i), z_max), z_max2 = larger(load(z + i + W), z_max2);
        r_max = larger(load(r + i), r_max), r_max2 = larger(load(r + i + W), r_max2);
    }
    for (; i < whole; i += W) z_max = larger(load(z + i), z_max), r_max = larger(load(r + i), r_max);
    if (rest) {
        z_max2 = larger(load_part(z + whole, rest, -INFINITY), z_max2);
        r_max2 = larger(load_part(r + whole, rest, -INFINITY), r_max2);
    }
    block->z_max = largest_of(larger(z_max, z_max2)), block->r_max = largest_of(larger(r_max, r_max2));
    const F z_shift = set1(block->z_max), r_shift = set1(block->r_max), scale = set1(t);
    F z_sum = set1(0), r_sum = set1(0), weighted = set1(0);
    auto step = [&](F zv, F rv, int64_t at) __attribute__((always_inline)) {
        Mask z_normal, r_normal;
        const F y = (zv - z_shift) * scale, x = (rv - r_shift) * scale;  // exactly 0 at the maximum, whatever t is
        const F ez = exponential(y, &z_normal), er = exponential(x, &r_normal);
        const F difference = REVERSE ? y - x : x - y;
        z_sum = z_sum + ez, r_sum = r_sum + er;
        // Where the weight is 0 the term is 0, also when the difference is infinite or NaN.
        weighted = fmadd(REVERSE ? ez : er, keep(REVERSE ? z_normal : r_normal, difference), weighted);
        if (STORE) store(first + at, ez), store(second + at, REVERSE ? difference : er);
    };
    for (i = 0; i < whole; i += W) {
        __builtin_prefetch(z + i + BLOCK), __builtin_prefetch(r + i + BLOCK);
        step(load(z + i), load(r + i), i);
    }
    if (rest) step(load_part(z + whole, rest, -INFINITY), load_part(r + whole, rest, -INFINITY), whole);
    block->z_sum = sum_of(z_sum), block->r_sum = sum_of(r_sum), block->weighted = sum_of(weighted);
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
    first_pass<T, REVERSE, STORE>(z, r, count, c.inverse_temperature, first, second, block);
}

INLINE bool nothing_left(const InterventionLoss& c) {
    return c.vocab == 0 || (c.exclude_answers && c.correct && c.vocab <= 2);
}

// The sums of the row from those of its blocks, and its divergence.
static Row join(const InterventionLoss& c, const Block* blocks, int64_t count) {
    Row row = {-FLT_MAX, -FLT_MAX, 0, 0, 0, 0};
    for (int64_t j = 0; j < count; j++) {
        row.z_max = blocks[j].z_max > row.z_max ? blocks[j].z_max : row.z_max;
        row.r_max = blocks[j].r_max > row.r_max ? blocks[j].r_max : row.r_max;
    }
    const double t = c.inverse_temperature;
    double weighted = 0;
    for (int64_t j = 0; j < count; j++) {
        const Block& b = blocks[j];
        const double dz = (b.z_max - row.z_max) * t, dr = (b.r_max - row.r_max) * t;
        const double z_scale = exp(dz), r_scale = exp(dr);
        row.z_sum += z_scale * b.z_sum, row.r_sum += r_scale * b.r_sum;
        const double scale = c.reverse ? z_scale : r_scale, sum = c.reverse ? b.z_sum : b.r_sum;
        if (scale * sum != 0)  // NaN takes part
            weighted += scale * (b.weighted + sum * (c.reverse ? dz - dr : dr - dz));
    }
    row.log_ratio = log(row.z_sum / row.r_sum);
    row.divergence = c.reverse ? weighted / row.z_sum - row.log_ratio : weighted / row.r_sum + row.log_ratio;
    if (row.divergence < 0) row.divergence = 0;  // rounding
    if (nothing_left(c)) row.divergence = 0;
    return row;
}

// What turns the scratch of a block into its gradient: forward a·first - b·second; reverse a·first·(second + b).
struct Scales { float a, b; };
static Scales scales_of(const InterventionLoss& c, const Row& row, const Block& block) {
    if (nothing_left(c)) return {0, 0};
    const double t = c.inverse_temperature, dz = (block.z_max - row.z_max) * t, dr = (block.r_max - row.r_max) * t;
    const float a = float(exp(dz) * t / row.z_sum);
    return {a, c.reverse ? float(dz - dr - row.log_ratio - row.divergence) : float(exp(dr) * t / row.r_sum)};
}

template <bool REVERSE> INLINE F gradient(F first, F second, F a, F b) {
    if (REVERSE) return keep(not_below(first, set1(FLT_MIN)), first * a * (second + b));
    return first * a - second * b;
}

template <class T, bool REVERSE>
INLINE void second_pass(const float* first, const float* second, int64_t count, Scales s, T* grad, bool streamed) {
    const F a = set1(s.a), b = set1(s.b);
    int64_t i = 0;
    if (streamed) {
        const int64_t bytes = W * sizeof(T), head = (bytes - (uintptr_t)grad % bytes) % bytes / sizeof(T);
        if (head && head <= count) {
            store_part(grad, gradient<REVERSE>(load(first), load(second), a, b), int(head));
            i = head;
        }
        for (; i + W <= count; i += W) stream(grad + i, gradient<REVERSE>(load(first + i), load(second + i), a, b));
    } else {
        for (; i + W <= count; i += W) store(grad + i, gradient<REVERSE>(load(first + i), load(second + i), a, b));
    }
    if (i < count) {
        const int rest = int(count - i);
        const F e = load_part(first + i, rest, 0), other = load_part(second + i, rest, 0);
        store_part(grad + i, gradient<REVERSE>(e, other, a, b), rest);
    }
}

// The two losses of the row and the gradient's answer columns, after the row's second pass.
template <class T, bool REVERSE>
static void finish(const InterventionLoss& c, int64_t n, const Row& row, const Block* blocks, const float* first,
                   const float* second) {
    c.faithfulness[n] = float(row.divergence);
    float* out = c.grad ? c.answer_grad + 3 * n : nullptr;
    if (!c.correct) {
        c.effectiveness[n] = 0;
        if (out) out[0] = out[1] = out[2] = 0;
        return;
    }
    const int64_t answers[2] = {c.correct[n], c.wrong[n]};
    const T* z = at(c.logits, n * c.logits_stride, T());
    const float hinge = c.margin - c.direction[n] * (widen(z[answers[0]]) - widen(z[answers[1]]));
    c.effectiveness[n] = hinge <= 0 ? 0 : hinge;  // NaN stays
    if (!out) return;
    out[2] = hinge > 0 ? -c.direction[n] : 0.0f;
    T* grad = (T*)c.grad + n * c.vocab;
    for (int a = 0; a < 2; a++) {
        const int64_t i = answers[a];
        const Scales s = scales_of(c, row, blocks[i / BLOCK]);
        float value[W];
        store(value, gradient<REVERSE>(set1(first[i]), set1(second[i]), set1(s.a), set1(s.b)));
        out[a] = c.exclude_answers ? 0.0f : value[0];
        narrow(out[a] + (a ? -out[2] : out[2]), grad + i);
    }
}

template <class T, bool REVERSE, bool STORE>
static void run(const InterventionLoss& c) {
    const int64_t blocks = (c.vocab + BLOCK - 1) / BLOCK, logits = c.rows * c.vocab;
    const int64_t width = STORE ? padded(c.vocab) : 0;
    const int threads = logits < SERIAL_LOGITS ? 1 : int(smaller(c.threads, c.rows * blocks));
    const bool streamed = logits * int64_t(sizeof(T)) >= STREAM_BYTES;
    const int64_t block_floats = padded(blocks * int64_t(sizeof(Block) / sizeof(float)));
    // Few rows: their blocks are dealt out, with a barrier after each pass. Many: each thread takes whole rows.
    const bool split = threads > 1 && c.rows < 4 * threads;
    const int64_t slots = split ? c.rows : threads, slot = 2 * width + block_floats;
    float* memory = scratch(slots * (slot + 16));
    auto first_of = [&](int64_t s) { return memory + s * slot; };
    auto blocks_of = [&](int64_t s) { return (Block*)(memory + s * slot + 2 * width); };
    Row* joined = (Row*)(memory + slots * slot);
    auto pass1 = [&](int64_t row, int64_t j, int64_t s) {
        float* first = first_of(s) + j * BLOCK;
        first_pass_of<T, REVERSE, STORE>(c, row, j * BLOCK, first, first + width, blocks_of(s) + j);
    };
    auto pass2 = [&](int64_t row, int64_t j, int64_t s, const Row& sums) {
        const float* first = first_of(s) + j * BLOCK;
        const int64_t count = smaller(BLOCK, c.vocab - j * BLOCK);
        T* grad = (T*)c.grad + row * c.vocab + j * BLOCK;
        second_pass<T, REVERSE>(first, first + width, count, scales_of(c, sums, blocks_of(s)[j]), grad, streamed);
    };
    if (threads == 1 || !split) {
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
            const int s = thread_index();
#pragma omp for schedule(dynamic, 1)
            for (int64_t row = 0; row < c.rows; row++) {
                for (int64_t j = 0; j < blocks; j++) pass1(row, j, s);
                const Row sums = join(c, blocks_of(s), blocks);
                if (STORE)
                    for (int64_t j = 0; j < blocks; j++) pass2(row, j, s, sums);
                finish<T, REVERSE>(c, row, sums, blocks_of(s), first_of(s), first_of(s) + width);
            }
            if (streamed) fence();
        }
        return;
    }
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < c.rows * blocks; i++) pass1(i / blocks, i % blocks, i / blocks);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < c.rows; row++) joined[row] = join(c, blocks_of(row), blocks);
        if (STORE) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < c.rows * blocks; i++) pass2(i / blocks, i % blocks, i / blocks, joined[i / blocks]);
        }
        if (streamed) fence();
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t row = 0; row < c.rows; row++)
            finish<T, REVERSE>(c, row, joined[row], blocks_of(row), first_of(row), first_of(row) + width);
    }
}

template <class T>
static void run_for(const InterventionLoss& c) {
    if (c.grad) c.reverse ? run<T, true, true>(c) : run<T, false, true>(c);
    else c.reverse ? run<T, true, false>(c) : run<T, false, false>(c);
}

static void intervention_loss(const InterventionLoss& c) {
    if (c.type == Type::float32) run_for<float>(c);
    else if (c.type == Type::bfloat16) run_for<bf16>(c);
    else run_for<half>(c);
}

}  // namespace ACTSCALE_LEVEL
}  // namespace actscale
