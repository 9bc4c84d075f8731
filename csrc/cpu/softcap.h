// The soft-cap of logits: u = s·tanh(z/s), and du/dz = 1 - tanh²(z/s).
//
// With e = 2^x, x = 2·log2(e)·z/s:  tanh = (e - 1)/(e + 1),  1 - tanh² = 4·e/(e + 1)².  e - 1 comes from the polynomial
// of 2^x without its 1, so that small logits keep their digits (3 ulp), and the slope has no difference of two ones: it
// stays exact where the cap flattens out. Beyond |x| = 64 nothing changes any more: tanh is 1, the slope below 3e-19.
#pragma once
#include "simd.h"

namespace actscale {
namespace ACTSCALE_LEVEL {

struct Cap {
    F to_power, softcap;
    INLINE_MEMBER explicit Cap(float s) : to_power(set1(float(2 * 1.4426950408889634 / s))), softcap(set1(s)) {}

    INLINE_MEMBER F of(F z, F* slope) const {
        const Split s = split(lesser(set1(64.0f), larger(set1(-64.0f), z * to_power)));  // NaN stays
        const F power = times_power_of_two(set1(1.0f), s.power), part = s.f * slope_of_power(s.f);
        const F less_one = fmadd(power, part, power - set1(1.0f));
        const F inverse = set1(1.0f) / (less_one + set1(2.0f));
        *slope = fmadd(power, part, power) * inverse * inverse * set1(4.0f);
        return less_one * inverse * softcap;
    }
};

}  // namespace ACTSCALE_LEVEL
}  // namespace actscale
