// α = ⟨w, x⟩ + c, y = x·(1 + β·α) per head, and its gradients. Formula: arXiv 2410.04962, eq. 10 (ops/reference.py).
//
// With g the row's group, β = strength · row_strength[b], dα the upstream of α (0 where it has none):
//   a[b,t,h]  = β·⟨x, dy⟩ + dα                    dx = dy·(1 + β·α) + a·w[g,h,:]
//   dw[g,h,:] = Σ_{b in g} Σ_t a·x                dc[g,h] = Σ_{b in g} Σ_t a
// Saved for backward: x, the probes, and α in float32, 4 bytes per vector. Bytes per element of x, b its size: forward
// 2·b (x, y); backward 3·b (x, dy, dx), 2·b without dx. The reductions are fused into this kernel: a block adds up its
// own tokens in registers and stores one partial of its heads, which group_sums.cu adds up in order: 8 bytes per
// element for each `steps` tokens. No atomics: two runs agree bit for bit.
//
// A block takes whole heads, since a product goes over a head before anything is written, and walks over `steps`
// tokens: of one row where rows have probes of their own, else of all rows in order. Heads of more than 256 vectors are
// walked over twice, for the product and for the rest; the second time they come from the cache, and so does the
// partial of dw.
//
// Tested under emulation and compiled for sm_80, sm_90 and sm_100. Not run on a GPU yet; no launch constant is
// measured.
#include "group_sums.h"
#include "head_channels.h"
#include "launch.h"

namespace actscale {
namespace cuda {
namespace {

constexpr int64_t MAX_STEPS = 64;  // float32 sums of that many tokens stay as exact as PyTorch's
// Blocks of 256 threads a multiprocessor over the whole grid: many forward, where the last wave is then a small part;
// backward those that run at once, since fewer blocks leave fewer partial sums.
constexpr int FORWARD_BLOCKS = 16, BACKWARD_BLOCKS = 3;

// How the grid covers [B, T, H, D]; a closed form of the shape.
struct Geometry {
    int span, tiles;  // threads per head; vectors per thread
    int heads, head_tiles;
    int64_t tokens;     // that share their probes: of one row, or of all
    int steps, chunks;  // tokens per block; blocks that share their probes
    int64_t blocks;
    int threads;
};

struct Call {
    DynamicScale scale;
    Geometry at;
    bool aligned;
    bool weight_aligned;
};

// `by_group`: rows have probes of their own.
Geometry geometry(const DynamicScale& c, bool by_group, int64_t multiprocessors, int64_t blocks_a_processor) {
    const int64_t vectors = ceil_div(c.width, c.type == Type::float32 ? 4 : 8);
    const int64_t spans = by_group ? c.rows : 1;
    Geometry g;
    g.span = int(most(least(vectors, CHANNEL_THREADS), 1));
    g.tiles = int(ceil_div(vectors, g.span));
    g.heads = int(least(c.heads, CHANNEL_THREADS / g.span));
    g.head_tiles = int(ceil_div(c.heads, g.heads));
    g.tokens = c.rows * c.positions / spans;
    g.threads = int(ceil_div(g.heads * g.span, 32) * 32);
    const int64_t wanted = ceil_div(c.rows * c.positions * g.head_tiles * g.threads,
                                    CHANNEL_THREADS * blocks_a_processor * multiprocessors);
    g.steps = int(least(least(most(wanted, 1), MAX_STEPS), g.tokens));
    g.chunks = int(ceil_div(g.tokens, g.steps));
    g.blocks = spans * g.chunks * g.head_tiles;
    return g;
}

// What of [B, T, H, D] is this thread's: some channels of one head, over some tokens.
template <class T> struct Place {
    int64_t chunk;  // over all spans
    int64_t row, position;
    int count, head, lane;
    bool here, known;  // whether there is such a head; such a group
    int64_t probe;     // of its head, in [G, H]

    DEVICE explicit Place(const Call& call) {
        const DynamicScale& c = call.scale;
        const Geometry& at = call.at;
        const int block_head = int(threadIdx.x) / at.span;
        chunk = blockIdx.x / unsigned(at.head_tiles);
        head = int(blockIdx.x % unsigned(at.head_tiles)) * at.heads + block_head;
        lane = int(threadIdx.x) % at.span;
        here = block_head < at.heads && head < c.heads;
        const int64_t first = chunk % at.chunks * at.steps, before = c.group ? chunk / at.chunks : 0;
        count = int(at.tokens - first < at.steps ? at.tokens - first : at.steps);
        row = before + first / c.positions, position = first % c.positions;
        const int64_t group = c.group ? c.group[row] : 0;
        known = group >= 0 && group < c.groups;
        probe = (known ? group : 0) * c.heads + (here ? head : 0);
    }

    DEVICE void next(const DynamicScale& c) {
        if (++position == c.positions) position = 0, row++;
    }
    DEVICE int channel(const Geometry& at, int tile) const { return (tile * at.span + lane) * WIDTH<T>; }
    DEVICE int64_t offset(const int64_t* stride) const {
        return row * stride[0] + position * stride[1] + head * stride[2];
    }
    DEVICE float strength(const DynamicScale& c) const {
        return c.row_strength ? c.strength * c.row_strength[row] : c.strength;
    }
    DEVICE int64_t token(const DynamicScale& c) const { return (row * c.positions + position) * c.heads + head; }
};

template <class T> DEVICE float product(const float (&p)[WIDTH<T>], const float (&q)[WIDTH<T>]) {
    float sum = 0;
#pragma unroll
    for (int e = 0; e < WIDTH<T>; e++) sum += p[e] * q[e];
    return sum;
}

// This thread's channels of one tile, 0 beyond the head's end.
template <class T> DEVICE Vector load(const T* from, int left, bool aligned) {
    return left > 0 ? load_channels(from, left, aligned) : Vector{};
}

template <class T> __global__ void __launch_bounds__(CHANNEL_THREADS, 4) dynamic_scale_kernel(const Call call) {
    constexpr int W = WIDTH<T>;
    const DynamicScale& c = call.scale;
    Place<T> place(call);
    const int width = place.here ? int(c.width) : 0;  // a thread without a head adds 0 and writes nothing
    const float* weight = c.weight + place.probe * c.width;
    const float bias = !place.known ? not_a_number() : c.bias ? c.bias[place.probe] : 0.0f;
    float* scratch = reinterpret_cast<float*>(dynamic_shared());
    const int start = place.channel(call.at, 0);
    float w[W], v[W];
    load_floats(weight + start, width - start, call.weight_aligned, w);
    // The next token's first tile is under way while this one is summed up.
    const T* x = static_cast<const T*>(c.x) + place.offset(c.x_stride);
    Vector next = load(x + start, place.count ? width - start : 0, call.aligned);
    for (int i = 0; i < place.count; i++) {
        const Vector now = next;
        const T* now_x = x;
        T* y = static_cast<T*>(c.out) + place.offset(c.out_stride);
        const int64_t token = place.token(c);
        const float strength = place.strength(c);
        place.next(c);
        if (i + 1 < place.count) {
            x = static_cast<const T*>(c.x) + place.offset(c.x_stride);
            next = load(x + start, width - start, call.aligned);
        }
        float sum = 0;
        for (int tile = call.at.tiles - 1; tile > 0; tile--) {
            const int channel = place.channel(call.at, tile), left = width - channel;
            float other[W];
            load_floats(weight + channel, left, call.weight_aligned, other);
            unpack(load(now_x + channel, left, call.aligned), v, T());
            sum += product<T>(v, other);
        }
        unpack(now, v, T());
        sum += product<T>(v, w);
        const float alpha = over_head(sum, call.at.span, scratch + i % 2 * CHANNEL_THREADS) + bias;
        const float factor = 1 + strength * alpha;
        if (place.here && place.lane == 0) c.scalars[token] = alpha;
        for (int tile = 0; tile < call.at.tiles; tile++) {
            const int channel = place.channel(call.at, tile), left = width - channel;
            if (left <= 0) continue;
            if (tile > 0) unpack(load(now_x + channel, left, call.aligned), v, T());
#pragma unroll
            for (int e = 0; e < W; e++) v[e] *= factor;
            store_channels(y + channel, left, call.aligned, pack(v, T()));
        }
    }
}

// WHOLE: a head is one tile, so that what a token needs stays in registers.
template <class T, bool WHOLE>
__global__ void __launch_bounds__(CHANNEL_THREADS, BACKWARD_BLOCKS) dynamic_scale_backward_kernel(const Call call) {
    constexpr int W = WIDTH<T>;
    const DynamicScale& c = call.scale;
    const int tiles = WHOLE ? 1 : call.at.tiles;
    Place<T> place(call);
    const int width = place.here ? int(c.width) : 0;
    const float* weight = c.weight + place.probe * c.width;
    float* dweight = c.dweight_partial;
    if (dweight) dweight += (place.chunk * c.heads + (place.here ? place.head : 0)) * c.width;
    float* scratch = reinterpret_cast<float*>(dynamic_shared());
    const int start = place.channel(call.at, 0);
    float w[W], v[W], g[W], dw[W] = {}, dbias = 0;
    load_floats(weight + start, width - start, call.weight_aligned, w);
    // The next token's first tile is under way while this one is summed up.
    const T* x = static_cast<const T*>(c.x) + place.offset(c.x_stride);
    const T* dy = static_cast<const T*>(c.dy) + place.offset(c.dy_stride);
    Vector next_x = load(x + start, place.count ? width - start : 0, call.aligned);
    Vector next_dy = load(dy + start, place.count ? width - start : 0, call.aligned);
    for (int i = 0; i < place.count; i++, place.next(c)) {
        const Vector now_x = next_x, now_dy = next_dy;
        const T *from_x = x, *from_dy = dy;
        if (i + 1 < place.count) {
            Place<T> after = place;
            after.next(c);
            x = static_cast<const T*>(c.x) + after.offset(c.x_stride);
            dy = static_cast<const T*>(c.dy) + after.offset(c.dy_stride);
            next_x = load(x + start, width - start, call.aligned);
            next_dy = load(dy + start, width - start, call.aligned);
        }
        float sum = 0;
        for (int tile = tiles - 1; tile > 0; tile--) {
            const int channel = place.channel(call.at, tile), left = width - channel;
            unpack(load(from_x + channel, left, call.aligned), v, T());
            unpack(load(from_dy + channel, left, call.aligned), g, T());
            sum += product<T>(v, g);
        }
        unpack(now_x, v, T()), unpack(now_dy, g, T());
        sum += product<T>(v, g);
        const float beta = place.strength(c);
        float a = beta * over_head(sum, call.at.span, scratch + i % 2 * CHANNEL_THREADS);
        if (!place.here) continue;
        if (c.d_scalars) a += c.d_scalars[place.offset(c.d_scalars_stride)];
        dbias += a;
        const float factor = c.out ? 1 + beta * c.scalars[place.token(c)] : 0.0f;  // NaN where there is no such group
        for (int tile = 0; tile < tiles; tile++) {
            const int channel = place.channel(call.at, tile), left = width - channel;
            if (left <= 0) continue;
            if (tile > 0) {
                unpack(load(from_x + channel, left, call.aligned), v, T());
                unpack(load(from_dy + channel, left, call.aligned), g, T());
            }
            if (!WHOLE) load_floats(weight + channel, left, call.weight_aligned, w);
            if (c.out) {
#pragma unroll
                for (int e = 0; e < W; e++) g[e] = g[e] * factor + a * w[e];
                T* dx = static_cast<T*>(c.out) + place.offset(c.out_stride) + channel;
                store_channels(dx, left, call.aligned, pack(g, T()));
            }
            if (WHOLE) {
#pragma unroll
                for (int e = 0; e < W; e++) dw[e] += a * v[e];
            } else if (dweight) {  // this thread's own channels: no other one reads them
#pragma unroll
                for (int e = 0; e < W; e++)
                    if (e < left) dweight[channel + e] = (i ? dweight[channel + e] : 0.0f) + a * v[e];
            }
        }
    }
    if (!place.here) return;
    if (WHOLE && dweight) {
#pragma unroll
        for (int e = 0; e < W; e++)
            if (e < width - start) dweight[start + e] = dw[e];
    }
    if (c.dbias_partial && place.lane == 0) c.dbias_partial[place.chunk * c.heads + place.head] = dbias;
}

Error prepare(Call& call, bool by_group, int64_t blocks_a_processor) {
    const DynamicScale& c = call.scale;
    if (c.width > (int64_t(1) << 30) || c.heads > (int64_t(1) << 30)) return "more than 2^30 channels or heads";
    Limits limits;
    if (Error error = device_limits(&limits)) return error;
    call.at = geometry(c, by_group, limits.multiprocessors, blocks_a_processor);
    return nullptr;
}

Shape shape_of(const Call& call) { return {call.at.blocks, call.at.threads, 1, 2 * CHANNEL_THREADS * 4}; }

bool empty(const DynamicScale& c) { return !c.rows || !c.positions || !c.heads; }

}  // namespace

Error dynamic_scale(const DynamicScale& scale) {
    if (empty(scale)) return nullptr;
    Call call = {scale, {}, false, floats_on_grid(scale.weight, scale.width)};
    if (Error error = prepare(call, scale.group, FORWARD_BLOCKS)) return error;
    call.aligned = on_grid(scale, scale.x, scale.x_stride) && on_grid(scale, scale.out, scale.out_stride);
    return with_type(scale.type, [&](auto zero) {
        return launch(dynamic_scale_kernel<decltype(zero)>, shape_of(call), scale.stream, call);
    });
}

Error dynamic_scale_chunks(const DynamicScale& scale, bool by_group, int64_t* chunks) {
    Call call = {scale, {}, false, floats_on_grid(scale.weight, scale.width)};
    if (Error error = prepare(call, by_group, BACKWARD_BLOCKS)) return error;
    *chunks = call.at.blocks / call.at.head_tiles;
    return nullptr;
}

Error dynamic_scale_backward(const DynamicScale& scale) {
    if (empty(scale)) return nullptr;
    Call call = {scale, {}, false, floats_on_grid(scale.weight, scale.width)};
    if (Error error = prepare(call, scale.group, BACKWARD_BLOCKS)) return error;
    call.aligned = on_grid(scale, scale.dy, scale.dy_stride) && on_grid(scale, scale.x, scale.x_stride) &&
                   (!scale.out || on_grid(scale, scale.out, scale.out_stride));
    Error error = with_type(scale.type, [&](auto zero) {
        using T = decltype(zero);
        const auto kernel =
            call.at.tiles == 1 ? dynamic_scale_backward_kernel<T, true> : dynamic_scale_backward_kernel<T, false>;
        return launch(kernel, shape_of(call), scale.stream, call);
    });
    if (error) return error;
    const GroupSums sums = {{{scale.dweight, scale.dweight_partial, 1, call.at.chunks, scale.heads * scale.width},
                             {scale.dbias, scale.dbias_partial, 1, call.at.chunks, scale.heads}},
                            scale.group,
                            scale.group ? scale.rows : 1,
                            scale.groups};
    return sum_groups(sums, scale.stream);
}

}  // namespace cuda
}  // namespace actscale
