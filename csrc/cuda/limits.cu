// What the process knows of its CUDA devices, and whether this build has code for them.
//
// A device runs the binary of its own major capability, of its own minor or an earlier one; else the driver compiles
// PTX of an earlier capability, which takes a driver no older than the toolkit that wrote the PTX.
#include <mutex>
#include <string>

#include "launch.h"

namespace actscale {
namespace cuda {
namespace {

constexpr int DEVICES = 64;
constexpr int OLDEST = 80;      // cp.async
thread_local std::string said;  // until this thread asks again

#ifdef __CUDA_ARCH_LIST__
constexpr int BUILT[] = {__CUDA_ARCH_LIST__};  // 800, 900, …
constexpr int BUILT_COUNT = int(sizeof(BUILT) / sizeof(BUILT[0]));
#else
constexpr int BUILT[] = {0}, BUILT_COUNT = 0;  // nvcc before 11.5: not known, so not checked
#endif

#ifndef ACTSCALE_EMULATE_CUDA
constexpr int TOOLKIT = CUDART_VERSION;

Error text_of(cudaError_t error) { return cudaGetLastError(), cudaGetErrorString(error); }

Error count_devices(int* count) {
    const cudaError_t error = cudaGetDeviceCount(count);
    return error ? text_of(error) : nullptr;
}

Error current_device(int* device) {
    const cudaError_t error = cudaGetDevice(device);
    return error ? text_of(error) : nullptr;
}

Error ask_limits(int device, Limits* out) {
    int value[5] = {};
    const cudaDeviceAttr attributes[5] = {
        cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrMaxSharedMemoryPerMultiprocessor,
        cudaDevAttrReservedSharedMemoryPerBlock, cudaDevAttrClusterLaunch, cudaDevAttrMultiProcessorCount};
    cudaError_t error = cudaSuccess;
    for (int i = 0; i < 5 && !error; i++) error = cudaDeviceGetAttribute(&value[i], attributes[i], device);
    if (error) return text_of(error);
    return *out = {value[4], value[0], value[1], value[2], value[3] ? 16 : 1}, nullptr;
}

Error ask_model(int device, DeviceModel* out) {
    cudaDeviceProp properties;
    int driver = 0;
    cudaError_t error = cudaDriverGetVersion(&driver);
    if (!error) error = cudaGetDeviceProperties(&properties, device);
    if (error) return text_of(error);
    out->capability = 10 * properties.major + properties.minor, out->driver = driver;
    strncpy(out->name, properties.name, sizeof(out->name) - 1);
    return nullptr;
}
#endif

}  // namespace

Error missing_code(const DeviceModel& at, const int* built, int count, int toolkit) {
    const auto dotted = [](int tenths) { return std::to_string(tenths / 10) + "." + std::to_string(tenths % 10); };
    said = at.name + std::string(" has compute capability ") + dotted(at.capability);
    if (at.capability < OLDEST) return (said += ", and the kernels need " + dotted(OLDEST) + " or later").c_str();
    std::string archs;
    bool by_driver = false;
    for (int i = 0; i < count; i++) {
        const int arch = built[i] / 10;
        if (arch / 10 == at.capability / 10 && arch <= at.capability) return nullptr;
        by_driver = by_driver || arch <= at.capability;
        archs += (i ? ", " : "") + dotted(arch);
    }
    if (!count || (by_driver && at.driver >= toolkit)) return nullptr;
    said += ", and this build has code for " + archs;
    said += by_driver ? ": a driver for CUDA " + dotted(at.driver / 100 + at.driver / 10 % 10) +
                            " cannot compile the PTX of CUDA " + dotted(toolkit / 100 + toolkit / 10 % 10) +
                            ", so update the driver or install again with ACTSCALE_CUDA_ARCHS="
                      : " only: install again with ACTSCALE_CUDA_ARCHS=";
    return (said += std::to_string(at.capability)).c_str();
}

Error device_limits(Limits* limits) {
#ifdef ACTSCALE_EMULATE_CUDA
    return *limits = emulated::device.limits, nullptr;
#else
    static Limits known[DEVICES];
    static std::mutex guard;  // launches run without the interpreter's lock
    int device = 0;
    if (Error error = current_device(&device)) return error;
    std::lock_guard<std::mutex> guarded(guard);
    if (device < DEVICES && known[device].multiprocessors) return *limits = known[device], nullptr;
    if (Error error = unavailable_on(device)) return error;
    if (Error error = ask_limits(device, limits)) return error;
    if (device < DEVICES) known[device] = *limits;
    return nullptr;
#endif
}

Error unavailable_on(int device) {
    DeviceModel model = {};
    if (Error error = ask_model(device, &model)) return error;
    return missing_code(model, BUILT, BUILT_COUNT, TOOLKIT);
}

Error unavailable_on_current() {
    int device = 0;
    if (Error error = current_device(&device)) return error;
    return unavailable_on(device);
}

Error unavailable() {
    int devices = 0;
    if (Error error = count_devices(&devices)) return error;
    if (!devices) return "no CUDA device was found";
    for (int device = devices - 1; device >= 0; device--) {  // what is said last is said of the first one
        const Error error = unavailable_on(device);
        if (!error || device == 0) return error;
    }
    return nullptr;
}

Built built() { return {BUILT, BUILT_COUNT, TOOLKIT}; }

}  // namespace cuda
}  // namespace actscale
