// One Adam step on all scalars and the proximal step of λ‖·‖₁ in Adam's own metric (ops/reference.py, proximal_adam_).
//
//   m ← β₁m + (1−β₁)g      v ← β₂v + (1−β₂)g²      ρ = lr/(√(v/(1−β₂ᵗ)) + ε)      (arXiv 1412.6980, alg. 1)
//   u = α − ρ·m/(1−β₁ᵗ)    α ← sign(u)·max(|u| − ρ·λ, 0)
// Nothing is saved. Bytes per scalar: 28 (α, m, v read and written, g read). For thousands of scalars that is a launch
// and nothing else: one block walks over all of them, and it alone counts the step. Beyond ONE_BLOCK scalars a block
// would be slower than the chip; then many blocks read `step`, and a second launch counts it.
//
// Tested under emulation and compiled for sm_80, sm_90 and sm_100. Not run on a GPU yet; no launch constant is
// measured.
#include "launch.h"

namespace actscale {
namespace cuda {
namespace {

constexpr int THREADS = 512;
constexpr int64_t A_BLOCK = 4 * THREADS;  // scalars a block takes where there are many blocks
constexpr int64_t ONE_BLOCK = 16 << 10;   // 32 rounds of one block cost about what another launch does

struct Call {
    int64_t count;
    float *parameter, *exp_avg, *exp_avg_sq, *step;
    const float* gradient;
    float lr, beta1, beta2, rest1, rest2, log_beta1, log_beta2, eps, l1;
    bool counts;  // the only block
};

__global__ void __launch_bounds__(THREADS) proximal_adam_kernel(const Call c) {
    const float step = *c.step + 1;
    // 1 − βᵗ loses its digits for β near 1 and small t
    const float correction1 = -expm1f(step * c.log_beta1), correction2 = -expm1f(step * c.log_beta2);
    const int64_t stride = int64_t(gridDim.x) * THREADS;
    for (int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x; i < c.count; i += stride) {
        const float g = c.gradient[i];
        const float m = c.beta1 * c.exp_avg[i] + c.rest1 * g, v = c.beta2 * c.exp_avg_sq[i] + c.rest2 * g * g;
        const float rate = c.lr / (sqrtf(v / correction2) + c.eps);
        const float moved = c.parameter[i] - rate * (m / correction1);
        const float left = fabsf(moved) - rate * c.l1;
        c.exp_avg[i] = m, c.exp_avg_sq[i] = v;
        c.parameter[i] = left <= 0 ? 0.0f : moved < 0 ? -left : left;  // a NaN stays one
    }
    if (!c.counts) return;
    __syncthreads();  // every thread has read the step
    if (threadIdx.x == 0) *c.step = step;
}

struct Count {
    float* step;
};
__global__ void __launch_bounds__(32) count_step_kernel(const Count c) {
    if (threadIdx.x == 0) *c.step += 1;
}

}  // namespace

Error proximal_adam(const ProximalAdam& c) {
    const bool one = c.count <= ONE_BLOCK;
    const Call call = {c.count,
                       c.parameter,
                       c.exp_avg,
                       c.exp_avg_sq,
                       c.step,
                       c.gradient,
                       float(c.lr),
                       float(c.beta1),
                       float(c.beta2),
                       float(1 - c.beta1),
                       float(1 - c.beta2),
                       float(log(c.beta1)),
                       float(log(c.beta2)),
                       float(c.eps),
                       float(c.l1),
                       one};
    const int64_t blocks = one ? 1 : least(ceil_div(c.count, A_BLOCK), 1 << 16);
    Error error = launch(proximal_adam_kernel, Shape{blocks, THREADS}, c.stream, call);
    if (!error && !one) error = launch(count_step_kernel, Shape{1, 32}, c.stream, Count{c.step});
    return error;
}

}  // namespace cuda
}  // namespace actscale
