// How a CUDA kernel is launched from the host, and what a launch has to know of its device.
// Nothing here waits for the device or allocates on it, so CUDA graphs capture every launch.
#pragma once
#include "device.h"
#include "kernels.h"

#ifndef ACTSCALE_EMULATE_CUDA
#include <cuda_runtime.h>
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
constexpr int DEVICES = 64;
constexpr int64_t SHARED_WITHOUT_ASKING = 48 << 10;

// The current device's limits, asked once per process.
inline Error limits_of_device(Limits* out) {
    static Limits known[DEVICES];  // two threads may both ask, and write the same
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error) return cudaGetErrorString(error);
    if (device < DEVICES && known[device].multiprocessors) return *out = known[device], nullptr;
    int value[5] = {};
    const cudaDeviceAttr attributes[5] = {
        cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrMaxSharedMemoryPerMultiprocessor,
        cudaDevAttrReservedSharedMemoryPerBlock, cudaDevAttrClusterLaunch, cudaDevAttrMultiProcessorCount};
    for (int i = 0; i < 5 && !error; i++) error = cudaDeviceGetAttribute(&value[i], attributes[i], device);
    if (error) return cudaGetErrorString(error);
    *out = {value[4], value[0], value[1], value[2], value[3] ? 16 : 1};
    if (device < DEVICES) known[device] = *out;
    return nullptr;
}

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

// Whether the device has room for a cluster of this shape: not every one has 16 multiprocessors that can form one.
template <class Call> bool fits(void (*kernel)(Call), const Shape& shape) {
    int clusters = 0;
    Configured at(shape, nullptr);
    const bool asked = !permit(kernel, shape) && !cudaOccupancyMaxActiveClusters(&clusters, kernel, &at.config);
    if (!asked) cudaGetLastError();
    return asked && clusters > 0;
}

// Null, or the error's text. The runtime's own record of the error is cleared: the caller raises it.
template <class Call> Error launch(void (*kernel)(Call), const Shape& shape, void* stream, const Call& call) {
    if (Error error = permit(kernel, shape)) return cudaGetLastError(), error;
    Configured at(shape, stream);
    const cudaError_t error = cudaLaunchKernelEx(&at.config, kernel, call);
    const cudaError_t last = cudaGetLastError();
    return error ? cudaGetErrorString(error) : last ? cudaGetErrorString(last) : nullptr;
}
#endif

}  // namespace cuda
}  // namespace actscale
