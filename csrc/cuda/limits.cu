// What the process knows of its CUDA devices.
#include "launch.h"

namespace actscale {
namespace cuda {

Error device_limits(Limits* limits) { return limits_of_device(limits); }

Error unavailable() {
#ifndef ACTSCALE_EMULATE_CUDA
    int devices = 0;
    const cudaError_t error = cudaGetDeviceCount(&devices);
    if (error) return cudaGetLastError(), cudaGetErrorString(error);
    if (!devices) return "no CUDA device was found";
#endif
    return nullptr;
}

}  // namespace cuda
}  // namespace actscale
