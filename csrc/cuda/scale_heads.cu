// y = x·(1 + β·α) + β·v per head, and its gradients. Formula: arXiv 2410.04962, eq. 4 and 5 (ops/reference.py).
//
// With g the row's group, p its position (or 0), β = strength · row_strength[b]:
//   y[b,t,h,:]    = x·(1 + β·α[g,p,h]) + β·v[g,p,h,:]          dx = dy·(1 + β·α)
//   dα[g,p,h]     = Σ_{b in g} β Σ_t ⟨x, dy⟩                   (no sum over t where p is t)
//   dv[g,p,h,:]   = Σ_{b in g} β Σ_t dy                        (likewise)
// Saved for backward: x where dα is wanted, and the scalars. Bytes per element of x, b its size: forward 2·b; backward
// 3·b (x, dy, dx), less b without dx and less b without dα. The reductions are fused into this kernel: a block adds up
// its own positions in registers and stores one partial per head (a channel, for dv); one more launch adds the partials
// of dα and dv up, in the order of rows and positions. No atomics.
//
// A block takes whole heads, 16 bytes of channels per thread, and walks over `steps` positions of one row. Where rows
// or heads lie off the 16-byte grid, the same threads read and write their channels one at a time.
//
// Tested under emulation and compiled for sm_80, sm_90 and sm_100. Not run on a GPU yet; no launch constant is
// measured.
#include "group_sums.h"
#include "head_channels.h"
#include "launch.h"

namespace actscale {
namespace cuda {
namespace {

constexpr int THREADS = CHANNEL_THREADS;
constexpr int UNROLL = 4;  // positions a thread reads before it writes: 16 KB of each tensor under way a block
constexpr int MAX_STEPS = 64;
// Blocks of THREADS a multiprocessor over the whole grid: many forward, where the last wave is then a small part;
// backward those that run at once, since fewer blocks leave fewer partial sums.
constexpr int FORWARD_BLOCKS = 16, BACKWARD_BLOCKS = 2;

// How the grid covers [B, T, H, D]; a closed form of the shape.
struct Geometry {
    int span;   // threads per head (of one channel tile)
    int heads;  // a block
    int head_tiles, channel_tiles;
    int steps, chunks;  // positions per block; blocks per row
    int threads;
};

struct Call {
    ScaleHeads scale;
    Geometry at;
    bool aligned;  // 16-byte accesses
    bool shift_aligned;
};

Geometry geometry(const ScaleHeads& c, int64_t multiprocessors, int64_t blocks_a_processor) {
    const int64_t width = c.type == Type::float32 ? 4 : 8, vectors = ceil_div(c.width, width);
    Geometry g;
    g.span = int(least(vectors, THREADS));
    g.channel_tiles = int(ceil_div(vectors, g.span));
    g.heads = int(least(c.heads, THREADS / g.span));
    g.head_tiles = int(ceil_div(c.heads, g.heads));
    const int64_t tiles = c.rows * c.positions * g.head_tiles * g.channel_tiles;
    g.threads = int(ceil_div(g.heads * g.span, 32) * 32);
    const int64_t wanted = most(ceil_div(tiles * g.threads, THREADS * blocks_a_processor * multiprocessors), 1);
    // Then each position has a partial of its own.
    const bool by_position = c.alpha_positions > 1 || c.shift_positions > 1;
    g.steps = by_position ? 1 : int(least(least(wanted, MAX_STEPS), c.positions));
    g.chunks = int(ceil_div(c.positions, g.steps));
    return g;
}

// What of [B, T, H, D] is this thread's: W channels of one head, over some positions of one row.
template <class T> struct Place {
    int64_t row, chunk;  // chunk: over all rows
    int first, count, head, channel;
    bool here;
    float beta;
    int64_t group;
    bool known;  // whether there is such a group

    DEVICE explicit Place(const Call& call) {
        const ScaleHeads& c = call.scale;
        const Geometry& at = call.at;
        const int block_head = int(threadIdx.x) / at.span;
        const int place = int(blockIdx.x) / at.head_tiles;
        head = int(blockIdx.x) % at.head_tiles * at.heads + block_head;
        channel = (int(blockIdx.y) * at.span + int(threadIdx.x) % at.span) * WIDTH<T>;
        chunk = place, row = place / at.chunks;
        first = place % at.chunks * at.steps;
        count = int(c.positions) - first < at.steps ? int(c.positions) - first : at.steps;
        here = block_head < at.heads && head < c.heads && channel < c.width;
        beta = c.row_strength ? c.strength * c.row_strength[row] : c.strength;
        group = c.group ? c.group[row] : c.groups > 1 ? row : 0;
        known = group >= 0 && group < c.groups;
    }

    DEVICE int64_t offset(const int64_t* stride) const { return row * stride[0] + head * stride[2] + channel; }

    DEVICE float factor(const ScaleHeads& c, int64_t t) const {
        if (!known) return not_a_number();
        if (!c.alpha) return 1;
        return 1 + beta * c.alpha[(group * c.alpha_positions + (c.alpha_positions > 1 ? t : 0)) * c.heads + head];
    }
};

template <class T> __global__ void __launch_bounds__(THREADS, 4) scale_heads_kernel(const Call call) {
    constexpr int W = WIDTH<T>;
    const ScaleHeads& c = call.scale;
    const Place<T> place(call);
    if (!place.here) return;
    const int left = int(c.width) - place.channel;
    const T* x = static_cast<const T*>(c.x) + place.offset(c.x_stride);
    T* y = static_cast<T*>(c.out) + place.offset(c.out_stride);
    const bool shifts = c.shift && place.known;
    float shift[W];
    auto load_shift = [&](int64_t t) {
        const int64_t at = place.group * c.shift_positions + t;
        const float* from = c.shift + (at * c.heads + place.head) * c.width + place.channel;
        load_floats(from, left, call.shift_aligned, shift);
    };
    if (shifts && c.shift_positions <= 1) load_shift(0);
    for (int begin = 0; begin < place.count; begin += UNROLL) {
        Vector values[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; u++)
            if (begin + u < place.count)
                values[u] = load_channels(x + int64_t(place.first + begin + u) * c.x_stride[1], left, call.aligned);
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            if (begin + u >= place.count) continue;
            const int64_t t = place.first + begin + u;
            const float factor = place.factor(c, t);
            float out[W];
            unpack(values[u], out, T());
#pragma unroll
            for (int e = 0; e < W; e++) out[e] *= factor;
            if (shifts) {
                if (c.shift_positions > 1) load_shift(t);
#pragma unroll
                for (int e = 0; e < W; e++) out[e] += place.beta * shift[e];
            }
            store_channels(y + t * c.out_stride[1], left, call.aligned, pack(out, T()));
        }
    }
}

template <class T> __global__ void __launch_bounds__(THREADS, BACKWARD_BLOCKS)
    scale_heads_backward_kernel(const Call call) {
    constexpr int W = WIDTH<T>;
    const ScaleHeads& c = call.scale;
    const Place<T> place(call);
    const int left = int(c.width) - place.channel, count = place.here ? place.count : 0;
    const T* dy = static_cast<const T*>(c.dy) + place.offset(c.dy_stride);
    const T* x = static_cast<const T*>(c.x) + (c.dalpha_partial ? place.offset(c.x_stride) : 0);
    T* dx = static_cast<T*>(c.out) + (c.out ? place.offset(c.out_stride) : 0);
    float dalpha = 0, dshift[W] = {};
    for (int begin = 0; begin < count; begin += UNROLL) {
        Vector grads[UNROLL], values[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            if (begin + u >= count) continue;
            const int64_t t = place.first + begin + u;
            grads[u] = load_channels(dy + t * c.dy_stride[1], left, call.aligned);
            if (c.dalpha_partial) values[u] = load_channels(x + t * c.x_stride[1], left, call.aligned);
        }
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            if (begin + u >= count) continue;
            const int64_t t = place.first + begin + u;
            float g[W];
            unpack(grads[u], g, T());
            if (c.dalpha_partial) {
                float v[W], product = 0;
                unpack(values[u], v, T());
#pragma unroll
                for (int e = 0; e < W; e++) product += g[e] * v[e];
                dalpha += product;
            }
#pragma unroll
            for (int e = 0; e < W; e++) dshift[e] += g[e];
            if (c.out) {
                const float factor = place.factor(c, t);
#pragma unroll
                for (int e = 0; e < W; e++) g[e] *= factor;
                store_channels(dx + t * c.out_stride[1], left, call.aligned, pack(g, T()));
            }
        }
    }
    if (c.dshift_partial && place.here) {
        float* out = c.dshift_partial + (place.chunk * c.heads + place.head) * c.width + place.channel;
#pragma unroll
        for (int e = 0; e < W; e++)
            if (e < left) out[e] = place.beta * dshift[e];
    }
    if (c.dalpha_partial) {
        dalpha = over_head(dalpha, call.at.span, reinterpret_cast<float*>(dynamic_shared()));
        if (place.here && int(threadIdx.x) % call.at.span == 0)
            c.dalpha_partial[(place.chunk * call.at.channel_tiles + blockIdx.y) * c.heads + place.head] =
                place.beta * dalpha;
    }
}

Error prepare(Call& call, int64_t blocks_a_processor) {
    const ScaleHeads& c = call.scale;
    const int64_t most = int64_t(1) << 30;
    if (c.width > most || c.heads > most || c.positions > most) return "more than 2^30 channels, heads or positions";
    Limits limits;
    if (Error error = device_limits(&limits)) return error;
    call.at = geometry(c, limits.multiprocessors, blocks_a_processor);
    return nullptr;
}

Shape shape_of(const Call& call) {
    const Geometry& at = call.at;
    return {call.scale.rows * at.chunks * at.head_tiles, at.threads, 1, THREADS * 4, at.channel_tiles};
}

bool empty(const ScaleHeads& c) { return !c.rows || !c.positions || !c.heads || !c.width; }

}  // namespace

Error scale_heads(const ScaleHeads& scale) {
    if (empty(scale)) return nullptr;
    Call call = {scale, {}, false, floats_on_grid(scale.shift, scale.width)};
    if (Error error = prepare(call, FORWARD_BLOCKS)) return error;
    call.aligned = on_grid(scale, scale.x, scale.x_stride) && on_grid(scale, scale.out, scale.out_stride);
    return with_type(scale.type, [&](auto zero) {
        return launch(scale_heads_kernel<decltype(zero)>, shape_of(call), scale.stream, call);
    });
}

Error scale_heads_partials(const ScaleHeads& scale, PartialSums* floats) {
    Call call = {scale, {}, false, floats_on_grid(scale.shift, scale.width)};
    if (Error error = prepare(call, BACKWARD_BLOCKS)) return error;
    const int64_t blocks = scale.rows * call.at.chunks;
    *floats = {blocks * call.at.channel_tiles * scale.heads, blocks * scale.heads * scale.width};
    return nullptr;
}

Error scale_heads_backward(const ScaleHeads& scale) {
    if (empty(scale)) return nullptr;
    Call call = {scale, {}, false, floats_on_grid(scale.shift, scale.width)};
    if (Error error = prepare(call, BACKWARD_BLOCKS)) return error;
    call.aligned = on_grid(scale, scale.dy, scale.dy_stride) &&
                   (!scale.dalpha_partial || on_grid(scale, scale.x, scale.x_stride)) &&
                   (!scale.out || on_grid(scale, scale.out, scale.out_stride));
    Error error = with_type(scale.type, [&](auto zero) {
        return launch(scale_heads_backward_kernel<decltype(zero)>, shape_of(call), scale.stream, call);
    });
    if (error || !(scale.dalpha_partial || scale.dshift_partial)) return error;
    const bool by_position = scale.alpha_positions > 1 || scale.shift_positions > 1;
    const int64_t positions = by_position ? scale.positions : 1, chunks = by_position ? 1 : call.at.chunks;
    const GroupSums sums = {
        {{scale.dalpha, scale.dalpha_partial, positions, chunks * call.at.channel_tiles, scale.heads},
         {scale.dshift, scale.dshift_partial, positions, chunks, scale.heads * scale.width}},
        scale.group,
        scale.rows,
        scale.groups};
    return sum_groups(sums, scale.stream);
}

}  // namespace cuda
}  // namespace actscale
