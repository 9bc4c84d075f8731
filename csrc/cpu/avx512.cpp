#define ACTSCALE_AVX512
#define ACTSCALE_LEVEL avx512
#include "level.h"

const actscale::Kernels& actscale::avx512_kernels() {
    static const Kernels kernels = avx512::table("avx512");
    return kernels;
}
