// The table of the C++ kernels for each SIMD level, and the scratch memory that they take from the bindings.
#pragma once
#include "../calls.h"

namespace actscale {

struct Kernels {
    const char* level;
    void (*scale_heads)(const ScaleHeads&);
    void (*scale_heads_backward)(const ScaleHeads&);
    void (*dynamic_scale)(const DynamicScale&);
    void (*dynamic_scale_backward)(const DynamicScale&);
    void (*scale_channels)(const ScaleChannels&);
    void (*scale_channels_backward)(const ScaleChannels&);
    void (*intervention_loss)(const InterventionLoss&);
    void (*intervention_loss_scale)(const InterventionLossScale&);
    void (*linear_softmax)(const LinearSoftmax&);
    void (*proximal_adam)(const ProximalAdam&);
    void (*powers_of_two)(const float* in, float* out, int64_t count);  // the kernels' 2^x, for its test
};

const Kernels& portable_kernels();
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& avx512_bf16_kernels();  // another linear_softmax in bfloat16; not built by a compiler that cannot
const Kernels& avx512_amx_kernels();   // another linear_softmax; not built by a compiler that cannot

// Scratch of the calling thread, 64-byte aligned, kept for the next call. Throws std::bad_alloc.
float* scratch(int64_t count);
// Gives the calling thread's scratch back where it is larger than `kept` floats.
void release_scratch(int64_t kept);

}  // namespace actscale
