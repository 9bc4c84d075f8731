#define ACTSCALE_AVX2
#define ACTSCALE_LEVEL avx2
#include "level.h"

const actscale::Kernels& actscale::avx2_kernels() {
    static const Kernels kernels = avx2::table("avx2");
    return kernels;
}
