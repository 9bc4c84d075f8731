// What the bindings and the kernels share: one plain struct a call, and one table of functions for each SIMD level.
// Pointers, sizes and strides in elements; no header of torch, no std container (see simd.h).
#pragma once
#include <stdint.h>

namespace actscale {

enum class Type : int { float32 = 0, bfloat16 = 1, float16 = 2 };

struct ScaleHeads {  // y = x·(1 + β·α) + β·v, and its gradients
    Type type;
    int64_t rows, positions, heads, width;      // B, T, H, D
    const void* x;
    const void* dy;                             // backward only
    void* out;                                  // y, or dx; null: not wanted
    int64_t x_stride[3], dy_stride[4], out_stride[3];
    const float* alpha;                         // [G, P, H] or null
    const float* shift;                         // [G, P, H, D] or null
    int64_t groups, alpha_positions, shift_positions;
    float strength;
    const float* row_strength;                  // [B] or null
    const int64_t* group;                       // [B] or null
    float* dalpha;                              // like alpha; null: not wanted
    float* dshift;
    int threads;
};

struct DynamicScale {  // α = ⟨w, x⟩ + c, y = x·(1 + β·α), and their gradients
    Type type;
    int64_t rows, positions, heads, width;      // B, T, H, D
    const void* x;
    const void* dy;                             // backward only
    void* out;                                  // y, or dx; null: not wanted
    int64_t x_stride[3], dy_stride[4], out_stride[3], d_scalars_stride[3];
    const float* weight;                        // [G, H, D]
    const float* bias;                          // [G, H] or null; forward only
    float* scalars;                             // α [B, T, H] contiguous: written forward, read backward
    const float* d_scalars;                     // its upstream or null; backward only
    int64_t groups;
    float strength;
    const float* row_strength;                  // [B] or null
    const int64_t* group;                       // [B] or null
    float* dweight;                             // like weight; null: not wanted
    float* dbias;                               // [G, H]; null: not wanted
    int threads;
};

struct ScaleChannels {  // y = x·w, one factor a channel, and its gradients
    Type type;
    int64_t rows, width;                        // N, d
    const void* x;
    const void* dy;                             // backward only
    void* out;                                  // y, or dx, contiguous; null: not wanted
    int64_t x_stride, dy_stride;                // of rows
    const float* weight;                        // [d]
    float* dweight;                             // [d]; null: not wanted
    int threads;
};

struct InterventionLoss {
    Type type;
    int64_t rows, vocab;                        // N, V
    const void* logits;
    const void* reference;
    int64_t logits_stride, reference_stride;    // of rows
    const int64_t* correct;                     // [N]; null: no answers
    const int64_t* wrong;
    const float* direction;
    const float* row_weight;                    // [N], without answers; null: 1. A row of weight 0 is not read
    float margin, inverse_temperature;
    float softcap;                              // of both sides, before the temperature, without answers; 0: none
    bool exclude_answers, reverse;
    float* effectiveness;                       // [N]
    float* faithfulness;                        // [N]
    void* grad;                                 // [N, V] contiguous; null: not wanted; may be `logits`
    float* answer_grad;                         // [N, 3], with grad
    int threads;
};

struct LinearSoftmax {  // softmax of z = s·(W·h + b) and its mean of W's rows
    Type type;                                  // of hidden and weight
    int64_t rows, vocab, width;                 // N, V, d
    const void* hidden;                         // [N, d]
    const void* weight;                         // [V, d]
    int64_t hidden_stride, weight_stride;       // of rows
    const float* bias;                          // [V] or null
    const int64_t* correct;                     // [N]; null: no answers
    const int64_t* wrong;
    bool exclude_answers;
    float scale;                                // s > 0
    int64_t bytes;                              // of partial sums and copies, at most (at least those of 64 rows)
    double* log_sum;                            // [N]
    float* mean;                                // [N, d]
    double* mean_bias;                          // [N]
    float* answers;                             // [N, 2]
    int threads;
};

struct ScaleGradient {  // the gradient of upstream 1 becomes that of the given upstream
    Type type;
    int64_t rows, vocab;
    void* grad;                                 // [N, V] contiguous
    const float* d_effectiveness;               // [N]
    const float* d_faithfulness;
    int64_t d_effectiveness_stride, d_faithfulness_stride;
    const int64_t* correct;
    const int64_t* wrong;
    const float* answer_grad;
    int threads;
};

struct ProximalAdam {
    int64_t count;
    float *parameter, *exp_avg, *exp_avg_sq, *step;
    const float* gradient;
    double lr, beta1, beta2, eps, l1;
};

struct Kernels {
    const char* level;
    void (*scale_heads)(const ScaleHeads&);
    void (*scale_heads_backward)(const ScaleHeads&);
    void (*dynamic_scale)(const DynamicScale&);
    void (*dynamic_scale_backward)(const DynamicScale&);
    void (*scale_channels)(const ScaleChannels&);
    void (*scale_channels_backward)(const ScaleChannels&);
    void (*intervention_loss)(const InterventionLoss&);
    void (*scale_gradient)(const ScaleGradient&);
    void (*linear_softmax)(const LinearSoftmax&);
    void (*l1_norm)(const float* values, float* sign, float* norm, int64_t count);  // sign may be null
    void (*proximal_adam)(const ProximalAdam&);
    void (*powers_of_two)(const float* in, float* out, int64_t count);              // the kernels' 2^x, for its test
};

const Kernels& portable_kernels();
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();

// Scratch of the calling thread, 64-byte aligned, kept for the next call. Throws std::bad_alloc.
float* scratch(int64_t count);
// Gives the calling thread's scratch back where it is larger than `kept` floats.
void release_scratch(int64_t kept);

}  // namespace actscale
