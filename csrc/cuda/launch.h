// How a CUDA kernel is launched from the host, and what a launch has to know of its device.
// Nothing here waits for the device or allocates on it, so CUDA graphs capture every launch.
#pragma once
#include "device.h"
#include "kernels.h"

#ifndef ACTSCALE_EMULATE_CUDA
#include <cuda_runtime.h>

#include <atomic>
#endif

namespace actscale {
namespace cuda {

struct Shape {
    int64_t blocks;
    int threads, cluster = 1;
    int64_t shared = 0;  // bytes of dynamic shared memory a block
    int64_t blocks_y = 1;
};

// What `run` returns for a zero of the device type that `type` names.
template <class Run> Error with_type(Type type, Run run) {
    return type == Type::float32 ? run(float32{}) : type == Type::bfloat16 ? run(bf16{}) : run(half16{});
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

#ifndef ACTSCALE_EMULATE_CUDA
constexpr int64_t SHARED_WITHOUT_ASKING = 48 << 10;

struct Configured {
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute cluster = {};
    Configured(const Configured&) = delete;
    Configured(const Shape& shape, void* stream) {
        config.gridDim = dim3(unsigned(shape.blocks), unsigned(shape.blocks_y));
        config.blockDim = dim3(unsigned(shape.threads));
        config.dynamicSmemBytes = size_t(shape.shared);
        config.stream = static_cast<cudaStream_t>(stream);
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim.x = unsigned(shape.cluster), cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
        config.attrs = &cluster, config.numAttrs = shape.cluster > 1;
    }
};

template <class Call> Error permit(void (*kernel)(Call), const Shape& shape) {
    const void* function = reinterpret_cast<const void*>(kernel);
    cudaError_t error = cudaSuccess;
    if (shape.shared > SHARED_WITHOUT_ASKING)
        error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shape.shared));
    if (!error && shape.cluster > PORTABLE_CLUSTER)
        error = cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    return error ? cudaGetErrorString(error) : nullptr;
}

// The largest cluster that the current device has room for, if each block takes a multiprocessor for itself: not every
// device has 16 multiprocessors that can form one, and a part of a GPU (MIG) may have fewer than 8. Asked once for each
// kernel and device.
template <class Call> int widest_cluster(void (*kernel)(Call), int threads, const Limits& limits) {
    constexpr int DEVICES = 64;
    static std::atomic<int> known[DEVICES];
    int device = 0;
    if (limits.max_cluster == 1 || cudaGetDevice(&device)) return 1;
    if (device < DEVICES && known[device]) return known[device];
    Shape shape = {limits.max_cluster, threads, limits.max_cluster, limits.shared_per_block};
    for (; shape.cluster > 1; shape.cluster /= 2, shape.blocks = shape.cluster) {
        int clusters = 0;
        Configured at(shape, nullptr);
        if (!permit(kernel, shape) && !cudaOccupancyMaxActiveClusters(&clusters, kernel, &at.config) && clusters) break;
        cudaGetLastError();  // the runtime's own record
    }
    if (device < DEVICES) known[device] = shape.cluster;
    return shape.cluster;
}

// Null, or the error's text. The runtime's own record of the error is cleared: the caller raises it.
template <class Call> Error launch(void (*kernel)(Call), const Shape& shape, void* stream, const Call& call) {
    if (Error error = permit(kernel, shape)) return cudaGetLastError(), error;
    Configured at(shape, stream);
    const cudaError_t error = cudaLaunchKernelEx(&at.config, kernel, call);
    const cudaError_t last = cudaGetLastError();
    if (!error && !last) return nullptr;
    if (Error reason = unavailable_on_current()) return reason;  // no code for this device: says what to do
    return cudaGetErrorString(error ? error : last);
}
#endif

}  // namespace cuda
}  // namespace actscale
