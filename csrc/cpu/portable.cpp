#define ACTSCALE_LEVEL portable
#include "level.h"

const actscale::Kernels& actscale::portable_kernels() {
    static const Kernels kernels = portable::table("portable");
    return kernels;
}
