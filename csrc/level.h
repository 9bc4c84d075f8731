// All kernels for one level; the including file names the level and gives the table its name.
#include "intervention_loss.h"
#include "scalars.h"
#include "scale_gradient.h"
#include "scale_heads.h"

namespace actscale {
namespace ACTSCALE_LEVEL {

static void exponential_of_all(const float* in, float* out, int64_t count) {
    for (int64_t i = 0; i < count; i += W) {
        const int n = int(smaller(W, count - i));
        Mask normal;
        store_part(out + i, exponential(load_part(in + i, n, 0), &normal), n);
    }
}

static Kernels table(const char* name) {
    return {name, scale_heads, scale_heads_backward, intervention_loss, scale_gradient, l1_norm, proximal_adam,
            exponential_of_all};
}

}  // namespace ACTSCALE_LEVEL
}  // namespace actscale
