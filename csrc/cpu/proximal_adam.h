// One Adam step (arXiv 1412.6980, alg. 1) and the soft threshold of λ‖·‖₁ in Adam's metric, all in registers:
//   rate = lr/(√(v/(1 - β2^k)) + ε),  moved = a - rate·m/(1 - β1^k),  a = sign(moved)·max(|moved| - rate·λ, 0)
#pragma once
#include "kernels.h"
#include "simd.h"

namespace actscale {
namespace ACTSCALE_LEVEL {

static void proximal_adam(const ProximalAdam& c) {
    const double step = double(*c.step) + 1;
    *c.step = float(step);
    // 1 - β^k cancels in float32 (relative error 5e-5 at β2 = 0.999, k = 1): in double, then rounded once.
    const F unbias1 = set1(float(1 / (1 - pow(c.beta1, step)))), unbias2 = set1(float(1 / (1 - pow(c.beta2, step))));
    const F beta1 = set1(float(c.beta1)), beta2 = set1(float(c.beta2));
    const F eps = set1(float(c.eps)), lr = set1(float(c.lr));
    const F rest1 = set1(float(1 - c.beta1)), rest2 = set1(float(1 - c.beta2)), l1 = set1(float(c.l1)), zero = set1(0);
    for (int64_t i = 0; i < c.count; i += W) {
        const int n = int(smaller(W, c.count - i));
        auto get = [&](const float* p) { return n == W ? load(p + i) : load_part(p + i, n, 0); };
        auto put = [&](float* p, F v) { n == W ? store(p + i, v) : store_part(p + i, v, n); };
        const F g = get(c.gradient);
        const F m = get(c.exp_avg) * beta1 + g * rest1, v = get(c.exp_avg_sq) * beta2 + g * g * rest2;
        const F rate = lr / (square_root(v * unbias2) + eps);
        const F moved = get(c.parameter) - rate * (m * unbias1), threshold = rate * l1;
        // max(moved - threshold, 0) + min(moved + threshold, 0): exactly 0 between the thresholds; NaN comes through.
        put(c.parameter, larger(zero, moved - threshold) - larger(zero, zero - moved - threshold));
        put(c.exp_avg, m), put(c.exp_avg_sq, v);
    }
}

}  // namespace ACTSCALE_LEVEL
}  // namespace actscale
