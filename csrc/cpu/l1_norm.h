// The l1 norm of the learned scalars, and its subgradient: their signs, 0 at 0.
#pragma once
#include "simd.h"

namespace actscale {
namespace ACTSCALE_LEVEL {

constexpr int64_t SUM_BLOCK = 2048;  // summed in float; blocks are joined in double

// `sign` may be null.
static void l1_norm(const float* values, float* sign, float* norm, int64_t count) {
    double total = 0;
    for (int64_t begin = 0; begin < count; begin += SUM_BLOCK) {
        const int64_t end = smaller(count, begin + SUM_BLOCK);
        F sum = set1(0);
        int64_t i = begin;
        for (; i + W <= end; i += W) sum = sum + absolute(load(values + i));
        float rest = 0;
        for (; i < end; i++) rest += fabsf(values[i]);
        total += double(sum_of(sum)) + rest;
    }
    if (sign)
        for (int64_t i = 0; i < count; i++) sign[i] = float((values[i] > 0) - (values[i] < 0));
    *norm = float(total);
}

}  // namespace ACTSCALE_LEVEL
}  // namespace actscale
