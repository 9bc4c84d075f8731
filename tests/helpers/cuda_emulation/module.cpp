// The CUDA bindings over the emulation, as a module of its own, and the emulated device's settings.
#include "cuda/device.h"
#include "bindings/bindings.h"

namespace py = pybind11;

PYBIND11_MODULE(emulated_kernels, module) {
    actscale::bind_cuda(module);
    module.def("set_limits", [](int multiprocessors, int64_t block, int64_t processor, int64_t reserved, int cluster) {
        emulated::device.limits = {multiprocessors, block, processor, reserved, cluster};
    });
    module.def("run_threads_backwards", [](bool reversed) { emulated::device.reversed = reversed; });
    module.def("launches", [] { return emulated::device.launches; });
}
