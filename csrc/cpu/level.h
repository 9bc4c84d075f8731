// All kernels for one level; the including file names the level and gives the table its name.
#include "dynamic_scale.h"
#include "intervention_loss.h"
#include "intervention_loss_scale.h"
#include "linear_softmax.h"
#include "proximal_adam.h"
#include "scale_channels.h"
#include "scale_heads.h"

namespace actscale {
namespace ACTSCALE_LEVEL {

static void powers_of_two(const float* in, float* out, int64_t count) {
    for (int64_t i = 0; i < count; i += W) {
        const int n = int(smaller(W, count - i));
        store_part(out + i, exponential2(load_part(in + i, n, 0)), n);
    }
}

static Kernels table(const char* name) {
    return {name,
            scale_heads,
            scale_heads_backward,
            dynamic_scale,
            dynamic_scale_backward,
            scale_channels,
            scale_channels_backward,
            intervention_loss,
            intervention_loss_scale,
            linear_softmax,
            proximal_adam,
            powers_of_two};
}

}  // namespace ACTSCALE_LEVEL
}  // namespace actscale
