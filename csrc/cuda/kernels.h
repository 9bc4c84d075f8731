// The CUDA launchers as the bindings see them: no CUDA header. Each returns null, or what CUDA said of the launch.
// A call's `stream` is a cudaStream_t of the current device, on which all pointers lie.
#pragma once
#include "../calls.h"

namespace actscale {
namespace cuda {

using Error = const char*;

constexpr int PORTABLE_CLUSTER = 8;  // blocks of a cluster that need no permission; a part of a GPU may hold fewer

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

// Partial sums of the backward: this many of dweight's [d].
Error scale_channels(const ScaleChannels& call);
Error scale_channels_parts(const ScaleChannels& call, int64_t* parts);
Error scale_channels_backward(const ScaleChannels& call);

// Null where kernels can be launched, on one device at least; else why not: no GPU, no driver, one that is too old, or
// no code for the device in this build. What is said holds until this thread asks again.
Error unavailable();
Error unavailable_on(int device);
Error unavailable_on_current();
Error device_limits(Limits* limits);

// As far as the choice of code depends on them: 10·major + minor; the CUDA version of the driver, 1000·major + 10·minor.
struct DeviceModel {
    int capability, driver;
    char name[256];
};
// Why a build for these architectures (800, 900, …) by a toolkit of that version has no code for the device, or null.
Error missing_code(const DeviceModel& at, const int* built, int count, int toolkit);

struct Built {
    const int* archs;
    int count, toolkit;
};
Built built();

}  // namespace cuda
}  // namespace actscale
