// linear_softmax as at the level avx512_amx, with vectors of 8 floats and the instructions on tiles emulated.
#define ACTSCALE_AVX2
#define ACTSCALE_LEVEL emulated_tiles
#include "cpu/linear_softmax_tiles.h"

namespace actscale {

void linear_softmax_of_emulated_tiles(const LinearSoftmax& c) {
    using namespace emulated_tiles;
    with_type(c.type, [&](auto zero) { linear_softmax_in_tiles<decltype(zero)>(c); });
}

void emulated_multiply_tiles(const float* sum, const uint32_t* a, const uint32_t* b, float* out) {
    using namespace emulated_tiles;
    const HeldTiles held;
    load_tile<0>(sum, 64), load_tile<1>(a, 64), load_tile<2>(b, 64);
    multiply_tiles<0, 1, 2>();
    store_tile<0>(out, 64);
}

}  // namespace actscale
