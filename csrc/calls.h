// One plain struct per op, for the C++ and the CUDA kernels: what Python passes to a call (bindings/fields.h).
// Sizes and strides are in elements. A null pointer stands for an input that is absent or an output that is not wanted.
// No header of torch and no std container: see cpu/simd.h.
#pragma once
#include <stdint.h>

namespace actscale {

enum class Type : int { float32 = 0, bfloat16 = 1, float16 = 2 };

struct ScaleHeads {  // y = x·(1 + β·α) + β·v, and its gradients
    Type type;
    int64_t rows, positions, heads, width;  // B, T, H, D
    const void* x;
    const void* dy;  // backward only
    void* out;       // y or dx
    int64_t x_stride[3], dy_stride[4], out_stride[3];
    const float* alpha;  // [G, P, H]
    const float* shift;  // [G, P, H, D]
    int64_t groups, alpha_positions, shift_positions;
    float strength;
    const float* row_strength;               // [B]
    const int64_t* group;                    // [B]
    float* dalpha;                           // like alpha
    float* dshift;                           // like shift
    float *dalpha_partial, *dshift_partial;  // CUDA backward: partial sums, of as many floats as PartialSums says
    int threads;
    void* stream;
};

struct DynamicScale {  // α = ⟨w, x⟩ + c, y = x·(1 + β·α), and their gradients
    Type type;
    int64_t rows, positions, heads, width;  // B, T, H, D
    const void* x;
    const void* dy;  // backward only
    void* out;       // y or dx
    int64_t x_stride[3], dy_stride[4], out_stride[3], d_scalars_stride[3];
    const float* weight;     // [G, H, D]
    const float* bias;       // [G, H]; forward only
    float* scalars;          // α [B, T, H] contiguous: written forward, read backward
    const float* d_scalars;  // the upstream of α; backward only
    int64_t groups;
    float strength;
    const float* row_strength;               // [B]
    const int64_t* group;                    // [B]
    float* dweight;                          // like weight
    float* dbias;                            // [G, H]
    float *dweight_partial, *dbias_partial;  // CUDA backward: partial sums
    int threads;
    void* stream;
};

struct ScaleChannels {  // y = x·w, one factor per channel, and its gradients
    Type type;
    int64_t rows, width;  // N, d
    const void* x;
    const void* dy;               // backward only
    void* out;                    // y or dx, contiguous
    int64_t x_stride, dy_stride;  // between rows
    const float* weight;          // [d]
    float* dweight;               // [d]
    float* dweight_partial;       // CUDA backward: partial sums
    int threads;
    void* stream;
};

struct InterventionLoss {
    Type type;
    int64_t rows, vocab;  // N, V
    const void* logits;
    const void* reference;
    int64_t logits_stride, reference_stride;  // between rows
    const int64_t* correct;                   // [N]; null: no answers
    const int64_t* wrong;
    const float* direction;
    const float* row_weight;  // [N], only without answers; null: 1. A row of weight 0 is not read
    const float* gradient_weight;  // [N, 2], only with answers: of E and F, in the gradient alone; null: 1
    float margin, inverse_temperature;
    float softcap;  // of both sides, before the temperature, only without answers; 0: none
    bool exclude_answers, reverse;
    float* effectiveness;  // [N]
    float* faithfulness;   // [N]
    void* grad;            // [N, V] contiguous; may be `logits`
    float* answer_grad;    // [N, 3], with grad
    const float* scalars;
    int64_t n_scalars;
    float* l1;    // []; null: no scalars
    float* sign;  // like scalars
    int threads;
    void* stream;
};

struct InterventionLossScale {  // turns the gradient of upstream 1 into that of the given upstream
    Type type;
    int64_t rows, vocab;
    void* grad;                    // [N, V] contiguous
    const float* d_effectiveness;  // [N]
    const float* d_faithfulness;
    int64_t d_effectiveness_stride, d_faithfulness_stride;
    const int64_t* correct;
    const int64_t* wrong;
    const float* answer_grad;
    int threads;
    void* stream;
};

struct LinearSoftmax {                     // softmax of z = s·(W·h + b), and its mean of W's rows
    Type type;                             // of hidden and weight
    int64_t rows, vocab, width;            // N, V, d
    const void* hidden;                    // [N, d]
    const void* weight;                    // [V, d]
    int64_t hidden_stride, weight_stride;  // between rows
    const float* bias;                     // [V]
    const int64_t* correct;                // [N]; null: no answers
    const int64_t* wrong;
    bool exclude_answers;
    float scale;        // s > 0
    int64_t bytes;      // of partial sums and copies, at most (at least those of 64 rows)
    double* log_sum;    // [N]
    float* mean;        // [N, d]
    double* mean_bias;  // [N]
    float* answers;     // [N, 2]
    int threads;
};

struct ProximalAdam {
    int64_t count;
    float *parameter, *exp_avg, *exp_avg_sq, *step;
    const float* gradient;
    double lr, beta1, beta2, eps, l1;
    void* stream;
};

}  // namespace actscale
