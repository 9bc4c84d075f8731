// linear_softmax in bfloat16 as at the level avx512_bf16, with vectors of 8 floats and that instruction emulated.
#define ACTSCALE_AVX2
#define ACTSCALE_BF16_PAIRS
#define ACTSCALE_LEVEL emulated_pairs
#include "cpu/linear_softmax.h"

namespace actscale {

void linear_softmax_of_emulated_pairs(const LinearSoftmax& c) {
    emulated_pairs::linear_softmax_of<emulated_pairs::bf16>(c);
}

void emulated_dot(const float* sum, const float* a, const float* b, float* out) {
    using namespace emulated_pairs;
    store(out, dot_pairs(load(sum), load_pairs(a), load_pairs(b)));
}

}  // namespace actscale
