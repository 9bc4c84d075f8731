// The CUDA launchers as the bindings see them: no CUDA header. Each returns null, or what CUDA said of the launch.
// `stream` is a cudaStream_t of the current device, on which all pointers lie.
#pragma once
#include "../cpu/kernels.h"

namespace actscale {
namespace cuda {

using Error = const char*;

constexpr int PORTABLE_CLUSTER = 8;  // blocks that every device with clusters can put into one

struct Limits {
    int multiprocessors;
    int64_t shared_per_block, shared_per_processor, shared_reserved;  // bytes; reserved: by the system, a block
    int max_cluster;                                                  // 1: the device has no clusters
};

struct Scalars {  // their l1 norm and sign ride along with the loss
    bool given;
    const float* values;
    int64_t count;
    float* l1;
    float* sign;  // null: not wanted
};

// How the losses' kernel is laid over the rows; a closed form of their shape and the device.
struct LossPlan {
    int cluster;          // blocks a row
    int64_t capacity;     // vectors of each of the two rows that a block holds
    bool kept;            // all of its share, or a ring that is filled again for the second pass
    int64_t shared;       // bytes
};

LossPlan plan_loss(int64_t rows, int64_t vocab, int64_t element_bytes, const Limits& limits);

Error intervention_loss(const InterventionLoss& call, const Scalars& scalars, void* stream);
Error scale_gradient(const ScaleGradient& call, void* stream);

// Floats of partial sums that the backward wants: {of dalpha, of dshift}.
struct PartialSums { int64_t dalpha, dshift; };
Error scale_heads(const ScaleHeads& call, void* stream);
Error scale_heads_partials(const ScaleHeads& call, PartialSums* floats);
Error scale_heads_backward(const ScaleHeads& call, float* dalpha_partial, float* dshift_partial, void* stream);

Error dynamic_scale(const DynamicScale& call, void* stream);
// Partial sums of the backward: this many of dweight's [H, D] and of dbias' [H].
Error dynamic_scale_chunks(const DynamicScale& call, int64_t* chunks);
Error dynamic_scale_backward(const DynamicScale& call, float* dweight_partial, float* dbias_partial, void* stream);

Error proximal_adam(const ProximalAdam& call, void* stream);

// Null where kernels can be launched; else why not: no GPU, no driver, or one that is too old.
Error unavailable();
Error device_limits(Limits* limits);

}  // namespace cuda
}  // namespace actscale
