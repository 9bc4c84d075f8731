// AVX-512 with AMX_BF16: linear_softmax by tiles of bfloat16 numbers, all else as at the level avx512.
#define ACTSCALE_AVX512
#define ACTSCALE_LEVEL avx512_amx
#include "kernels.h"
#include "linear_softmax_tiles.h"

namespace actscale {
namespace avx512_amx {

static void linear_softmax(const LinearSoftmax& c) {
    with_type(c.type, [&](auto zero) { linear_softmax_in_tiles<decltype(zero)>(c); });
}

static Kernels table() {
    Kernels kernels = avx512_kernels();
    kernels.level = "avx512_amx", kernels.linear_softmax = linear_softmax;
    return kernels;
}

}  // namespace avx512_amx
}  // namespace actscale

const actscale::Kernels& actscale::avx512_amx_kernels() {
    static const Kernels kernels = avx512_amx::table();
    return kernels;
}
