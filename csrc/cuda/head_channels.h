// How a block reads and adds up heads: 16 bytes of channels per thread, `span` threads per head, whole heads per block.
// Where rows or heads lie off the 16-byte grid, the same threads read and write their channels one at a time.
#pragma once
#include "device.h"

namespace actscale {
namespace cuda {

constexpr int CHANNEL_THREADS = 256;  // a block, at most

template <class T> DEVICE Vector load_channels(const T* from, int left, bool aligned) {
    if (aligned) return *reinterpret_cast<const Vector*>(from);
    Vector out = {};
#pragma unroll
    for (int e = 0; e < WIDTH<T>; e++)
        if (e < left) out.word[e * sizeof(T) / 4] |= uint32_t(from[e].bits) << (e * sizeof(T) * 8 % 32);
    return out;
}

template <class T> DEVICE void store_channels(T* to, int left, bool aligned, const Vector& value) {
    if (aligned) {
        *reinterpret_cast<Vector*>(to) = value;
        return;
    }
#pragma unroll
    for (int e = 0; e < WIDTH<T>; e++)
        if (e < left) to[e].bits = decltype(T::bits)(value.word[e * sizeof(T) / 4] >> (e * sizeof(T) * 8 % 32));
}

// This thread's factors or terms as floats, 0 beyond the last channel. `aligned`: rows of them lie on the 16-byte grid.
template <int W> DEVICE void load_floats(const float* from, int left, bool aligned, float (&out)[W]) {
    if (aligned && left >= W) {
#pragma unroll
        for (int i = 0; i < W / 4; i++) {
            const Vector four = reinterpret_cast<const Vector*>(from)[i];
#pragma unroll
            for (int e = 0; e < 4; e++) out[4 * i + e] = bits_to_float(four.word[e]);
        }
        return;
    }
#pragma unroll
    for (int e = 0; e < W; e++) out[e] = e < left ? from[e] : 0.0f;
}

// The sum over a head's threads, in a fixed order: parts of a warp or whole warps by a butterfly, their sums one after
// the other. For every thread of the head. `scratch`: a float per thread, not written again before all have read it.
DEVICE float over_head(float value, int span, float* scratch) {
    const int thread = int(threadIdx.x), lanes = span % 32 == 0 ? 32 : 32 % span == 0 ? span : 1;
    for (int mask = lanes / 2; mask; mask /= 2) value += __shfl_xor_sync(0xffffffffu, value, mask);
    if (lanes == span) return value;
    scratch[thread] = value;
    __syncthreads();
    const int first = thread - thread % span;
    value = scratch[first];
    for (int i = lanes; i < span && first + i < int(blockDim.x); i += lanes) value += scratch[first + i];
    return value;
}

// Host: whether rows of `width` floats lie on the 16-byte grid.
inline bool floats_on_grid(const float* p, int64_t width) {
    return reinterpret_cast<uintptr_t>(p) % 16 == 0 && width % 4 == 0;
}

// Host: whether every head's vector of [B, T, H, D] begins on the grid and ends on it.
template <class Call> bool on_grid(const Call& c, const void* p, const int64_t* stride) {
    const int64_t vector = c.type == Type::float32 ? 4 : 8, size[3] = {c.rows, c.positions, c.heads};
    bool on_grid = reinterpret_cast<uintptr_t>(p) % 16 == 0 && c.width % vector == 0;
    for (int i = 0; i < 3; i++) on_grid = on_grid && (size[i] == 1 || stride[i] % vector == 0);
    return on_grid;
}

}  // namespace cuda
}  // namespace actscale
