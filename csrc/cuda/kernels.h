// The CUDA launchers as the bindings see them: no CUDA header. Each returns null, or what CUDA said of the launch.
// A call's `stream` is a cudaStream_t of the current device, on which all pointers lie.
#pragma once
#include "../calls.h"

namespace actscale {
namespace cuda {

using Error = const char*;

constexpr int PORTABLE_CLUSTER = 8;  // blocks that every device with clusters can put into one

struct Limits {
    int multiprocessors;
    int64_t shared_per_block, shared_per_processor, shared_reserved;  // bytes; reserved: by the system, a block
    int max_cluster;                                                  // 1: the device has no clusters
};

// How the losses' kernel is laid over the rows; a closed form of their shape and the device.
struct LossPlan {
    int cluster;       // blocks per row
    int64_t capacity;  // vectors of each of the two rows that a block holds
    bool kept;         // all of its share, or a ring that is filled again for the second pass
    int64_t shared;    // bytes
};

LossPlan plan_loss(int64_t rows, int64_t vocab, int64_t element_bytes, const Limits& limits);

Error intervention_loss(const InterventionLoss& call);
Error intervention_loss_scale(const InterventionLossScale& call);

// Floats of partial sums that the backward wants: {of dalpha, of dshift}.
struct PartialSums {
    int64_t dalpha, dshift;
};
Error scale_heads(const ScaleHeads& call);
Error scale_heads_partials(const ScaleHeads& call, PartialSums* floats);
Error scale_heads_backward(const ScaleHeads& call);

Error dynamic_scale(const DynamicScale& call);
// Partial sums of the backward: this many of dweight's [H, D] and of dbias' [H].
Error dynamic_scale_chunks(const DynamicScale& call, bool by_group, int64_t* chunks);
Error dynamic_scale_backward(const DynamicScale& call);

Error proximal_adam(const ProximalAdam& call);

// Null where kernels can be launched; else why not: no GPU, no driver, or one that is too old.
Error unavailable();
Error device_limits(Limits* limits);

}  // namespace cuda
}  // namespace actscale
