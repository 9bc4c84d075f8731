// AVX-512 with AVX512_BF16: linear_softmax in bfloat16 with that instruction, all else as at the level avx512.
#define ACTSCALE_AVX512
#define ACTSCALE_BF16_PAIRS
#define ACTSCALE_LEVEL avx512_bf16
#include "linear_softmax.h"

namespace actscale {
namespace avx512_bf16 {

static void linear_softmax(const LinearSoftmax& c) {
    c.type == Type::bfloat16 ? linear_softmax_of<bf16>(c) : avx512_kernels().linear_softmax(c);
}

static Kernels table() {
    Kernels kernels = avx512_kernels();
    kernels.level = "avx512_bf16", kernels.linear_softmax = linear_softmax;
    return kernels;
}

}  // namespace avx512_bf16
}  // namespace actscale

const actscale::Kernels& actscale::avx512_bf16_kernels() {
    static const Kernels kernels = avx512_bf16::table();
    return kernels;
}
