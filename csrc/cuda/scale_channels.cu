// y = x·w, one factor per channel, and its gradients. Formula: arXiv 2205.05638, section 3.3 (ops/reference.py).
//
//   y[n,d] = x[n,d]·w[d]        dx[n,d] = dy[n,d]·w[d]        dw[d] = Σ_n x[n,d]·dy[n,d]
// Saved for backward: x where dw is wanted, and w. Bytes per element of x, b its size: forward 2·b; backward 3·b (x, dy,
// dx), less b without dx and less b without dw. The sums are fused into this kernel: a thread adds up its channels over
// its rows in registers and stores one partial of each; group_sums.cu adds them up in order. No atomics.
//
// A thread keeps the factors of its 16 bytes of channels in registers and walks over `steps` rows; where rows are short,
// a block takes several at once. Rows off the 16-byte grid are read and written one channel at a time.
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
constexpr int UNROLL = 4;  // rows a thread reads before it writes: 16 KB of each tensor under way a block
constexpr int MAX_STEPS = 64;
constexpr int BLOCKS_PER_PROCESSOR = 16;  // over the whole grid: the last wave is a small part of it

// How the grid covers [N, d]; a closed form of the shape.
struct Geometry {
    int span;  // threads per row (of one channel tile)
    int rows;  // at once, in a block
    int channel_tiles;
    int steps;  // rows that a thread walks over
    int64_t chunks;
};

struct Call {
    ScaleChannels scale;
    Geometry at;
    bool aligned;  // 16-byte accesses
    bool floats_aligned;
};

Geometry geometry(const ScaleChannels& c, int64_t multiprocessors) {
    const int64_t vectors = ceil_div(c.width, c.type == Type::float32 ? 4 : 8);
    Geometry g;
    g.span = int(least(vectors, THREADS));
    g.rows = THREADS / g.span;
    g.channel_tiles = int(ceil_div(vectors, g.span));
    const int64_t passes = ceil_div(c.rows, g.rows);
    const int64_t wanted = passes * g.channel_tiles / (BLOCKS_PER_PROCESSOR * multiprocessors);
    g.steps = int(least(most(wanted, 1), MAX_STEPS));
    g.chunks = ceil_div(passes, g.steps);
    return g;
}

// What of [N, d] is this thread's: W channels of every `stride`-th row from `first` on.
template <class T> struct Place {
    int64_t first;
    int stride, count, channel, left;  // left: channels from this one on
    int64_t part;                      // of the partial sums

    DEVICE explicit Place(const Call& call) {
        const Geometry& at = call.at;
        const int lane = int(threadIdx.x) / at.span;
        channel = (int(blockIdx.y) * at.span + int(threadIdx.x) % at.span) * WIDTH<T>;
        left = lane < at.rows ? int(call.scale.width) - channel : 0;
        part = int64_t(blockIdx.x) * at.rows + lane;
        stride = at.rows, first = int64_t(blockIdx.x) * at.steps * at.rows + lane;
        const int64_t rows = call.scale.rows - first;
        const int64_t mine = rows <= 0 ? 0 : (rows + stride - 1) / stride;
        count = left <= 0 ? 0 : int(mine < at.steps ? mine : at.steps);
    }

    DEVICE int64_t row(int i) const { return first + int64_t(i) * stride; }
};

template <class T> __global__ void __launch_bounds__(THREADS, 4) scale_channels_kernel(const Call call) {
    constexpr int W = WIDTH<T>;
    const ScaleChannels& c = call.scale;
    const Place<T> place(call);
    const T* x = static_cast<const T*>(c.x) + place.channel;
    T* y = static_cast<T*>(c.out) + place.channel;
    float w[W];
    load_floats(c.weight + place.channel, place.left, call.floats_aligned, w);
    for (int begin = 0; begin < place.count; begin += UNROLL) {
        Vector values[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; u++)
            if (begin + u < place.count)
                values[u] = load_channels(x + place.row(begin + u) * c.x_stride, place.left, call.aligned);
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            if (begin + u >= place.count) continue;
            float out[W];
            unpack(values[u], out, T());
#pragma unroll
            for (int e = 0; e < W; e++) out[e] *= w[e];
            store_channels(y + place.row(begin + u) * c.width, place.left, call.aligned, pack(out, T()));
        }
    }
}

template <class T> __global__ void __launch_bounds__(THREADS, 2) scale_channels_backward_kernel(const Call call) {
    constexpr int W = WIDTH<T>;
    const ScaleChannels& c = call.scale;
    const Place<T> place(call);
    const T* dy = static_cast<const T*>(c.dy) + place.channel;
    const T* x = static_cast<const T*>(c.x) + place.channel;
    T* dx = static_cast<T*>(c.out) + place.channel;
    float w[W], dw[W] = {};
    load_floats(c.weight + place.channel, place.left, call.floats_aligned, w);
    for (int begin = 0; begin < place.count; begin += UNROLL) {
        Vector grads[UNROLL], values[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            if (begin + u >= place.count) continue;
            const int64_t row = place.row(begin + u);
            grads[u] = load_channels(dy + row * c.dy_stride, place.left, call.aligned);
            if (c.dweight_partial) values[u] = load_channels(x + row * c.x_stride, place.left, call.aligned);
        }
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            if (begin + u >= place.count) continue;
            float g[W];
            unpack(grads[u], g, T());
            if (c.dweight_partial) {
                float v[W];
                unpack(values[u], v, T());
#pragma unroll
                for (int e = 0; e < W; e++) dw[e] += g[e] * v[e];
            }
            if (c.out) {
#pragma unroll
                for (int e = 0; e < W; e++) g[e] *= w[e];
                store_channels(dx + place.row(begin + u) * c.width, place.left, call.aligned, pack(g, T()));
            }
        }
    }
    if (c.dweight_partial) {  // of a thread without rows too: it is one of the parts
        float* out = c.dweight_partial + place.part * c.width + place.channel;
#pragma unroll
        for (int e = 0; e < W; e++)
            if (e < place.left) out[e] = dw[e];
    }
}

Error prepare(Call& call) {
    if (call.scale.width > (int64_t(1) << 30)) return "more than 2^30 channels";
    Limits limits;
    if (Error error = device_limits(&limits)) return error;
    call.at = geometry(call.scale, limits.multiprocessors);
    return nullptr;
}

Shape shape_of(const Call& call) { return {call.at.chunks, THREADS, 1, 0, call.at.channel_tiles}; }

bool on_grid(const ScaleChannels& c, const void* p, int64_t stride) {
    const int64_t vector = c.type == Type::float32 ? 4 : 8;
    return reinterpret_cast<uintptr_t>(p) % 16 == 0 && c.width % vector == 0 && (c.rows == 1 || stride % vector == 0);
}

bool empty(const ScaleChannels& c) { return !c.rows || !c.width; }

}  // namespace

Error scale_channels(const ScaleChannels& scale) {
    if (empty(scale)) return nullptr;
    Call call = {scale, {}, false, floats_on_grid(scale.weight, scale.width)};
    if (Error error = prepare(call)) return error;
    call.aligned = on_grid(scale, scale.x, scale.x_stride) && on_grid(scale, scale.out, scale.width);
    return with_type(scale.type, [&](auto zero) {
        return launch(scale_channels_kernel<decltype(zero)>, shape_of(call), scale.stream, call);
    });
}

Error scale_channels_parts(const ScaleChannels& scale, int64_t* parts) {
    Call call = {scale, {}, false, floats_on_grid(scale.weight, scale.width)};
    if (Error error = prepare(call)) return error;
    *parts = call.at.chunks * call.at.rows;
    return nullptr;
}

Error scale_channels_backward(const ScaleChannels& scale) {
    if (empty(scale)) return nullptr;
    Call call = {scale, {}, false, floats_on_grid(scale.weight, scale.width)};
    if (Error error = prepare(call)) return error;
    call.aligned = on_grid(scale, scale.dy, scale.dy_stride) &&
                   (!scale.dweight_partial || on_grid(scale, scale.x, scale.x_stride)) &&
                   (!scale.out || on_grid(scale, scale.out, scale.width));
    Error error = with_type(scale.type, [&](auto zero) {
        return launch(scale_channels_backward_kernel<decltype(zero)>, shape_of(call), scale.stream, call);
    });
    if (error || !scale.dweight_partial) return error;
    const int64_t parts = call.at.chunks * call.at.rows;
    const GroupSums sums = {{{scale.dweight, scale.dweight_partial, 1, parts, scale.width}, {}}, nullptr, 1, 1};
    return sum_groups(sums, scale.stream);
}

}  // namespace cuda
}  // namespace actscale
