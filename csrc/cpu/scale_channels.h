// y = x·w, one factor per channel, and dx = dy·w, dw = Σ_rows x·dy in one pass over x and dy.
//
// Moved: forward 2 elements of x's type per element; backward 3 with dx (dy, x, dx), 2 without it, 2 (dy, dx) without
// dw. w stays in the first-level cache. The sums: rows are cut into chunks that depend on the shapes alone. A chunk
// adds up its rows in order, in float; chunks are joined in double, in order. Columns never meet in a sum, so they may
// be dealt out to as many threads as there are without changing a bit.
#pragma once
#include "kernels.h"
#include "scale_heads.h"

namespace actscale {
namespace ACTSCALE_LEVEL {

constexpr int64_t MOST_CHANNEL_CHUNKS = 256;  // their sums are 1 KiB per channel at most
constexpr int64_t CHANNEL_BLOCK = 64;         // columns that are split and joined together: whole cache lines
constexpr int ROWS_AT_ONCE = 4;               // of one load and store of the sums

template <class T>
static void scale_channels_of(const ScaleChannels& c) {
    const int threads = c.rows * c.width < SERIAL_ELEMENTS ? 1 : int(smaller(c.threads, c.rows));
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t n = 0; n < c.rows; n++) {
        const T* x = (const T*)c.x + n * c.x_stride;
        T* y = (T*)c.out + n * c.width;
        int64_t d = 0;
        for (; d + W <= c.width; d += W) store(y + d, load(x + d) * load(c.weight + d));
        for (; d < c.width; d++) narrow(widen(x[d]) * c.weight[d], y + d);
    }
}

// `R` rows of the columns [begin, end) from row n on: dx, and x·dy into `sums` (null: not wanted), row after row.
template <int R, class T>
INLINE void scale_channels_backward_rows(const ScaleChannels& c, int64_t n, int64_t begin, int64_t end, float* sums) {
    const T* dy = (const T*)c.dy + n * c.dy_stride;
    const T* x = (const T*)c.x + n * c.x_stride;
    T* dx = c.out ? (T*)c.out + n * c.width : nullptr;
    int64_t d = begin;
    for (; d + W <= end; d += W) {
        const F w = load(c.weight + d);
        F sum = sums ? load(sums + d) : set1(0);
        UNROLL_LOOPS
        for (int r = 0; r < R; r++) {
            const F g = load(dy + r * c.dy_stride + d);
            if (sums) sum = fmadd(g, load(x + r * c.x_stride + d), sum);
            if (dx) store(dx + r * c.width + d, g * w);
        }
        if (sums) store(sums + d, sum);
    }
    if (d == end) return;
    const int count = int(end - d);
    const F w = load_part(c.weight + d, count, 0);
    F sum = sums ? load_part(sums + d, count, 0) : set1(0);
    for (int r = 0; r < R; r++) {
        const F g = load_part(dy + r * c.dy_stride + d, count, 0);
        if (sums) sum = fmadd(g, load_part(x + r * c.x_stride + d, count, 0), sum);
        if (dx) store_part(dx + r * c.width + d, g * w, count);
    }
    if (sums) store_part(sums + d, sum, count);
}

template <class T>
static void scale_channels_backward_of(const ScaleChannels& c) {
    const int64_t rows = greater(CHUNK_ROWS, (c.rows + MOST_CHANNEL_CHUNKS - 1) / MOST_CHANNEL_CHUNKS);
    const int64_t chunks = (c.rows + rows - 1) / rows, blocks = (c.width + CHANNEL_BLOCK - 1) / CHANNEL_BLOCK;
    const int threads = c.rows * c.width < SERIAL_ELEMENTS ? 1 : int(smaller(c.threads, chunks * blocks));
    const int64_t splits = chunks >= 4 * threads || !chunks ? 1 : smaller(blocks, (4 * threads + chunks - 1) / chunks);
    float* memory = c.dweight ? scratch(chunks * c.width + 1) : nullptr;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)  // neighbours stay with one thread, the one that had them in the forward pass
        for (int64_t unit = 0; unit < chunks * splits; unit++) {
            const int64_t chunk = unit / splits, part = unit % splits;
            const int64_t begin = blocks * part / splits * CHANNEL_BLOCK;
            const int64_t end = smaller(c.width, blocks * (part + 1) / splits * CHANNEL_BLOCK);
            float* sums = memory ? memory + chunk * c.width : nullptr;
            if (sums) memset(sums + begin, 0, sizeof(float) * (end - begin));
            const int64_t last = smaller(c.rows, (chunk + 1) * rows);
            int64_t n = chunk * rows;
            for (; n + ROWS_AT_ONCE <= last; n += ROWS_AT_ONCE)
                scale_channels_backward_rows<ROWS_AT_ONCE, T>(c, n, begin, end, sums);
            for (; n < last; n++) scale_channels_backward_rows<1, T>(c, n, begin, end, sums);
        }
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; block++) {
            if (!memory) continue;
            const int64_t begin = block * CHANNEL_BLOCK, count = smaller(CHANNEL_BLOCK, c.width - begin);
            double total[CHANNEL_BLOCK] = {};
            for (int64_t chunk = 0; chunk < chunks; chunk++) {
                const float* sums = memory + chunk * c.width + begin;
                for (int64_t i = 0; i < count; i++) total[i] += sums[i];
            }
            for (int64_t i = 0; i < count; i++) c.dweight[begin + i] = float(total[i]);
        }
    }
}

static void scale_channels(const ScaleChannels& c) {
    with_type(c.type, [&](auto zero) { scale_channels_of<decltype(zero)>(c); });
}

static void scale_channels_backward(const ScaleChannels& c) {
    with_type(c.type, [&](auto zero) { scale_channels_backward_of<decltype(zero)>(c); });
}

}  // namespace ACTSCALE_LEVEL
}  // namespace actscale
