// y = x·(1 + β·α) + β·v for each head, and dx = dy·(1 + β·α), dα = Σ β·⟨x, dy⟩, dv = Σ β·dy in one pass over x and dy.
//
// Moved: forward 2 elements of x's type per element; backward 3 with dx (dy, x, dx), 2 without, 1 for dv alone.
// The sums: rows of x are cut into chunks that depend on the shapes alone. A chunk sums in float, lane by lane, about
// CHUNK_ROWS rows; chunks are joined in double, in order. Heads never meet in a sum, so a chunk's heads may be dealt
// out to as many threads as there are without changing a bit. Where α (or v) has one entry per position, the thread
// that owns the position adds its rows in order, straight into the result.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace actscale {
namespace ACTSCALE_LEVEL {

constexpr int64_t CHUNK_ROWS = 64;
constexpr int64_t SERIAL_ELEMENTS = 96 << 10;  // below, one thread is as fast (backward: 18 vs 17 us at 83k elements)

template <class Call> INLINE float strength_of(const Call& c, int64_t b) {
    return c.row_strength ? c.strength * c.row_strength[b] : c.strength;
}
template <class Call> INLINE int64_t group_of(const Call& c, int64_t b) { return c.group ? c.group[b] : 0; }
// Row (group, position) of α or v.
INLINE int64_t entry(int64_t group, int64_t positions, int64_t t) {
    return group * positions + (positions == 1 ? 0 : t);
}

template <class T>
INLINE void scale_row(const T* x, T* y, const float* shift, float factor, float beta, int64_t width) {
    const F f = set1(factor), b = set1(beta);
    int64_t d = 0;
    for (; d + W <= width; d += W) {
        const F scaled = load(x + d) * f;
        store(y + d, shift ? scaled + b * load(shift + d) : scaled);
    }
    for (; d < width; d++) {
        const float scaled = widen(x[d]) * factor;
        narrow(shift ? scaled + beta * shift[d] : scaled, y + d);
    }
}

template <class T>
static void scale_heads_of(const ScaleHeads& c) {
    const int64_t tokens = c.rows * c.positions;
    const int threads = tokens * c.heads * c.width < SERIAL_ELEMENTS ? 1 : int(smaller(c.threads, tokens));
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < tokens; i++) {
        const int64_t b = i / c.positions, t = i % c.positions, g = group_of(c, b);
        const float beta = strength_of(c, b);
        const float* alpha = c.alpha ? c.alpha + entry(g, c.alpha_positions, t) * c.heads : nullptr;
        const float* shift = c.shift ? c.shift + entry(g, c.shift_positions, t) * c.heads * c.width : nullptr;
        const T* x = (const T*)c.x + b * c.x_stride[0] + t * c.x_stride[1];
        T* y = (T*)c.out + b * c.out_stride[0] + t * c.out_stride[1];
        for (int64_t h = 0; h < c.heads; h++)
            scale_row(x + h * c.x_stride[2], y + h * c.out_stride[2], shift ? shift + h * c.width : nullptr,
                      alpha ? 1 + beta * alpha[h] : 1.0f, beta, c.width);
    }
}

// How the rows are cut. `slots`: sums kept apart in a chunk, one for each group where a chunk meets several.
struct Plan {
    int64_t rows, positions, row_chunks, position_chunks, slots, alpha_floats, shift_floats;
};

static Plan plan_of(const ScaleHeads& c) {
    const bool owned = (c.dalpha && c.alpha_positions > 1) || (c.dshift && c.shift_positions > 1);
    Plan p;
    p.rows = owned ? c.rows : c.groups > 1 ? 1 : greater(1, CHUNK_ROWS / greater(1, smaller(c.positions, CHUNK_ROWS)));
    p.rows = greater(1, smaller(p.rows, c.rows));
    p.positions = greater(1, smaller(c.positions, CHUNK_ROWS / p.rows));
    const bool joined = (c.dalpha && c.alpha_positions == 1) || (c.dshift && c.shift_positions == 1);
    if (owned && !joined) p.positions = (c.positions + c.threads - 1) / c.threads;  // any cut gives the same bits
    p.row_chunks = (c.rows + p.rows - 1) / p.rows, p.position_chunks = (c.positions + p.positions - 1) / p.positions;
    p.slots = owned ? c.groups : 1;
    p.alpha_floats = c.dalpha && c.alpha_positions == 1 ? p.slots * c.heads * W : 0;
    p.shift_floats = c.dshift && c.shift_positions == 1 ? p.slots * c.heads * c.width : 0;
    return p;
}

// One (row, position, head): dx, the products' lanes into `lanes` (or their sum into `dot`), β·dy into `dshift`.
template <class T>
INLINE void scale_heads_backward_row(const T* dy, const T* x, T* dx, float factor, float beta, float* lanes, float* dot,
                                     float* dshift, int64_t width) {
    const F f = set1(factor), b = set1(beta);
    F sum = set1(0), sum2 = sum;
    auto step = [&](F dyv, const T* xp, T* dxp, float* shift, F* into, int count) __attribute__((always_inline)) {
        const bool whole = count == W;
        if (lanes || dot) *into = fmadd(dyv, whole ? load(xp) : load_part(xp, count, 0), *into);
        if (dx) whole ? store(dxp, dyv * f) : store_part(dxp, dyv * f, count);
        if (dshift) {
            const F added = (whole ? load(shift) : load_part(shift, count, 0)) + b * dyv;
            whole ? store(shift, added) : store_part(shift, added, count);
        }
    };
    int64_t d = 0;
    for (; d + 2 * W <= width; d += 2 * W) {
        step(load(dy + d), x + d, dx + d, dshift + d, &sum, W);
        step(load(dy + d + W), x + d + W, dx + d + W, dshift + d + W, &sum2, W);
    }
    if (d + W <= width) step(load(dy + d), x + d, dx + d, dshift + d, &sum, W), d += W;
    if (d < width) step(load_part(dy + d, int(width - d), 0), x + d, dx + d, dshift + d, &sum2, int(width - d));
    if (lanes) store(lanes, fmadd(b, sum + sum2, load(lanes)));
    if (dot) *dot += beta * sum_of(sum + sum2);
}

template <class T>
static void scale_heads_backward_chunk(const ScaleHeads& c, const Plan& p, int64_t chunk, int64_t head_begin,
                                       int64_t head_end, float* alpha_sums, float* shift_sums, T* gathered) {
    const int64_t b_begin = chunk / p.position_chunks * p.rows, b_end = smaller(c.rows, b_begin + p.rows);
    const int64_t t_begin = chunk % p.position_chunks * p.positions;
    const int64_t t_end = smaller(c.positions, t_begin + p.positions);
    const bool gather = c.dy_stride[3] != 1;  // one head of dy at a time, into `gathered`
    const T* gathered_from = nullptr;
    for (int64_t b = b_begin; b < b_end; b++) {
        const int64_t g = group_of(c, b), slot = p.slots > 1 ? g : 0;
        const float beta = strength_of(c, b);
        for (int64_t t = t_begin; t < t_end; t++) {
            const float* alpha = c.alpha ? c.alpha + entry(g, c.alpha_positions, t) * c.heads : nullptr;
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
                float* lanes = p.alpha_floats ? alpha_sums + (slot * c.heads + h) * W : nullptr;
                float* dot = c.dalpha && !lanes ? c.dalpha + entry(g, c.alpha_positions, t) * c.heads + h : nullptr;
                float* dshift = nullptr;
                if (p.shift_floats) dshift = shift_sums + (slot * c.heads + h) * c.width;
                else if (c.dshift) dshift = c.dshift + (entry(g, c.shift_positions, t) * c.heads + h) * c.width;
                scale_heads_backward_row(dy, x, dx, alpha ? 1 + beta * alpha[h] : 1.0f, beta, lanes, dot, dshift,
                                         c.width);
            }
        }
    }
}

// The chunks' sums of one head, joined in order. `sums`: a double for each group, then one for each group and column.
static void join_head(const ScaleHeads& c, const Plan& p, const float* memory, int64_t h, double* sums) {
    const int64_t chunks = p.row_chunks * p.position_chunks;
    double* columns = sums + c.groups;
    memset(sums, 0, sizeof(double) * c.groups * (1 + (p.shift_floats ? c.width : 0)));
    for (int64_t i = 0; i < chunks * p.slots; i++) {
        const int64_t chunk = i / p.slots, slot = i % p.slots;
        const int64_t g = p.slots > 1 ? slot : group_of(c, chunk / p.position_chunks * p.rows);
        const float* alpha_sums = memory + chunk * (p.alpha_floats + p.shift_floats);
        const float* shift_sums = alpha_sums + p.alpha_floats + (slot * c.heads + h) * c.width;
        if (p.alpha_floats) sums[g] += sum_of(load(alpha_sums + (slot * c.heads + h) * W));
        if (p.shift_floats)
            for (int64_t d = 0; d < c.width; d++) columns[g * c.width + d] += shift_sums[d];
    }
    for (int64_t g = 0; g < c.groups; g++) {
        if (p.alpha_floats) c.dalpha[g * c.heads + h] = float(sums[g]);
        if (p.shift_floats)
            for (int64_t d = 0; d < c.width; d++)
                c.dshift[(g * c.heads + h) * c.width + d] = float(columns[g * c.width + d]);
    }
}

// Runs `sum_chunk(chunk, first head, last head, alpha sums, shift sums, memory for a gathered head)` over all chunks,
// their heads dealt out where there are few, each after its sums were set to 0, and joins the chunks' sums.
template <class Run>
INLINE void over_chunks(const ScaleHeads& c, const Plan& p, Run sum_chunk) {
    const int64_t chunks = p.row_chunks * p.position_chunks, chunk_floats = p.alpha_floats + p.shift_floats;
    const int64_t elements = c.rows * c.positions * c.heads * c.width;
    const int threads = elements < SERIAL_ELEMENTS ? 1 : int(smaller(c.threads, chunks * c.heads));
    const int64_t splits = chunks >= 4 * threads || !chunks ? 1 : smaller(c.heads, (4 * threads + chunks - 1) / chunks);
    const int64_t own = (c.width + 15) / 16 * 16 + 2 * c.groups * (1 + c.width);  // floats: one head of dy, `sums`
    float* memory = scratch(chunks * chunk_floats + threads * own + 2);
    float* own_memory = memory + (chunks * chunk_floats + 1) / 2 * 2;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float* gathered = own_memory + thread_index() * own;
        double* sums = (double*)(gathered + (c.width + 15) / 16 * 16);
#pragma omp for schedule(static)  // neighbours stay with one thread, the one that had them in the forward pass
        for (int64_t unit = 0; unit < chunks * splits; unit++) {
            const int64_t chunk = unit / splits, part = unit % splits;
            const int64_t begin = c.heads * part / splits, end = c.heads * (part + 1) / splits;
            float* alpha_sums = memory + chunk * chunk_floats;
            float* shift_sums = alpha_sums + p.alpha_floats;
            for (int64_t slot = 0; slot < p.slots && begin < end; slot++) {
                if (p.alpha_floats)
                    memset(alpha_sums + (slot * c.heads + begin) * W, 0, sizeof(float) * (end - begin) * W);
                if (p.shift_floats)
                    memset(shift_sums + (slot * c.heads + begin) * c.width, 0, sizeof(float) * (end - begin) * c.width);
            }
            sum_chunk(chunk, begin, end, alpha_sums, shift_sums, gathered);
        }
#pragma omp for schedule(static)
        for (int64_t h = 0; h < c.heads; h++)
            if (chunk_floats) join_head(c, p, memory, h, sums);
    }
}

template <class T>
static void scale_heads_backward_of(const ScaleHeads& c) {
    const Plan p = plan_of(c);
    const int64_t group_bytes = sizeof(float) * c.groups * c.heads;
    if (c.dalpha && !p.alpha_floats) memset(c.dalpha, 0, group_bytes * c.alpha_positions);
    if (c.dshift && !p.shift_floats) memset(c.dshift, 0, group_bytes * c.shift_positions * c.width);
    over_chunks(c, p, [&](int64_t chunk, int64_t begin, int64_t end, float* alpha_sums, float* shift_sums, float* own) {
        scale_heads_backward_chunk<T>(c, p, chunk, begin, end, alpha_sums, shift_sums, (T*)own);
    });
}

static void scale_heads(const ScaleHeads& c) {
    with_type(c.type, [&](auto zero) { scale_heads_of<decltype(zero)>(c); });
}

static void scale_heads_backward(const ScaleHeads& c) {
    with_type(c.type, [&](auto zero) { scale_heads_backward_of<decltype(zero)>(c); });
}

}  // namespace ACTSCALE_LEVEL
}  // namespace actscale
