// Turns the gradient that intervention_loss wrote for an upstream of 1 into that of the given upstream, in place.
// Moved: nothing for a row whose two factors are 1, else a read and a write an element (two elements where only the
// effectiveness has another factor). The answer columns are rounded once, from float32.
#pragma once
#include "intervention_loss.h"

namespace actscale {
namespace ACTSCALE_LEVEL {

template <class T>
static void intervention_loss_scale_of(const InterventionLossScale& c) {
    int64_t scaled = 0;  // rows; for two answers a row no thread need wake up
    for (int64_t n = 0; n < c.rows; n++) scaled += c.d_faithfulness[n * c.d_faithfulness_stride] != 1;
    const int threads = scaled * c.vocab < SERIAL_LOGITS ? 1 : int(smaller(c.threads, c.rows));
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t n = 0; n < c.rows; n++) {
        const float effect = c.d_effectiveness[n * c.d_effectiveness_stride];
        const float faith = c.d_faithfulness[n * c.d_faithfulness_stride];
        T* grad = (T*)c.grad + n * c.vocab;
        if (faith != 1) {
            const F factor = set1(faith);
            const int64_t whole = c.vocab / W * W;
            for (int64_t i = 0; i < whole; i += W) store(grad + i, load(grad + i) * factor);
            for (int64_t i = whole; i < c.vocab; i++) narrow(widen(grad[i]) * faith, grad + i);
        }
        if (c.correct && (faith != 1 || effect != 1)) {
            const float* answers = c.answer_grad + 3 * n;
            narrow(faith * answers[0] + effect * answers[2], grad + c.correct[n]);
            narrow(faith * answers[1] - effect * answers[2], grad + c.wrong[n]);
        }
    }
}

static void intervention_loss_scale(const InterventionLossScale& c) {
    with_type(c.type, [&](auto zero) { intervention_loss_scale_of<decltype(zero)>(c); });
}

}  // namespace ACTSCALE_LEVEL
}  // namespace actscale
