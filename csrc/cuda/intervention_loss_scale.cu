// The backward pass of the losses: turns their saved gradient, of an upstream of 1, into that of the given upstream, in
// place.
//
// With dE, dF a row's upstream factors and a its three answer gradients (ops/interface.py, intervention_loss):
//   grad[v] ← dF·grad[v]               for v not an answer
//   grad[c] ← dF·a[0] + dE·a[2]        grad[w] ← dF·a[1] − dE·a[2]       both in float32 before rounding
// The factors are read on the device. Rows whose two factors are 1 return at once (the usual case of a summed loss),
// rows with dF = 1 rewrite their two answers alone. Bytes per logit of b bytes: 2·b, or nothing.
//
// Tested under emulation and compiled for sm_80, sm_90 and sm_100. Not run on a GPU yet; no launch constant is
// measured.
#include "launch.h"
#include "rows.h"

namespace actscale {
namespace cuda {
namespace {

constexpr int THREADS = 256;
constexpr int UNROLL = 4;  // vectors a thread reads before it writes: 16 KB under way a block
constexpr int STEP = THREADS * UNROLL;
// Blocks a multiprocessor over the whole grid: a few waves even out rows that return at once.
constexpr int BLOCKS_PER_PROCESSOR = 16;

struct Call {
    InterventionLossScale scale;
    int splits;  // blocks per row
    int steps;   // a block
};

template <class T> __global__ void __launch_bounds__(THREADS, 4) intervention_loss_scale_kernel(const Call call) {
    constexpr int W = WIDTH<T>;
    const InterventionLossScale& c = call.scale;
    const int64_t row = blockIdx.x / call.splits;
    const int split = int(blockIdx.x % call.splits), vocab = int(c.vocab), thread = int(threadIdx.x);
    const float d_e = c.d_effectiveness[row * c.d_effectiveness_stride];
    const float d_f = c.d_faithfulness[row * c.d_faithfulness_stride];
    if (d_e == 1 && d_f == 1) return;

    T* grad = static_cast<T*>(c.grad) + row * c.vocab;
    int64_t first = -1, second = -1;
    float at_first = 0, at_second = 0;
    if (c.correct) {
        const float* a = c.answer_grad + 3 * row;
        first = c.correct[row], second = c.wrong[row];
        at_first = d_f * a[0] + d_e * a[2], at_second = d_f * a[1] - d_e * a[2];
    }
    if (d_f == 1) {
        if (split == 0 && thread == 0 && first >= 0 && first < vocab) narrow(at_first, grad + first);
        if (split == 0 && thread == 1 && second >= 0 && second < vocab) narrow(at_second, grad + second);
        return;
    }
    const int shift = off_grid(grad);
    for (int step = split * call.steps; step < (split + 1) * call.steps; step++) {
        Vector values[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            const int column = (step * STEP + u * THREADS + thread) * W - shift;
            if (column >= 0 && column + W <= vocab) values[u] = *reinterpret_cast<const Vector*>(grad + column);
            else if (column < vocab) values[u] = part_of(grad, column, vocab);
        }
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            const int column = (step * STEP + u * THREADS + thread) * W - shift;
            if (column >= vocab) continue;
            float g[W];
            unpack(values[u], g, T());
#pragma unroll
            for (int e = 0; e < W; e++)
                g[e] = column + e == first ? at_first : column + e == second ? at_second : d_f * g[e];
            put(grad, column, vocab, pack(g, T()));
        }
    }
}

template <class T> Error launch_scale(Call call, const Limits& limits, T) {
    const InterventionLossScale& c = call.scale;
    const int64_t steps = most(ceil_div(c.vocab + WIDTH<T> - 1, STEP * WIDTH<T>), 1);
    const int64_t wanted = ceil_div(BLOCKS_PER_PROCESSOR * int64_t(limits.multiprocessors), c.rows);
    call.steps = int(ceil_div(steps, least(wanted, steps)));
    call.splits = int(ceil_div(steps, call.steps));
    return launch(intervention_loss_scale_kernel<T>, Shape{c.rows * call.splits, THREADS}, c.stream, call);
}

}  // namespace

Error intervention_loss_scale(const InterventionLossScale& scale) {
    if (!scale.rows) return nullptr;
    if (scale.vocab > MOST_COLUMNS) return TOO_MANY_COLUMNS;
    Limits limits;
    if (Error error = device_limits(&limits)) return error;
    const Call call = {scale, 1, 1};
    return with_type(scale.type, [&](auto zero) { return launch_scale(call, limits, zero); });
}

}  // namespace cuda
}  // namespace actscale
