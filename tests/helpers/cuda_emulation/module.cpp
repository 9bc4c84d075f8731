// The CUDA bindings over the emulation, as a module of its own, and the emulated device's settings.
#include <dlfcn.h>

#include "cuda/device.h"
#include "bindings/bindings.h"

namespace py = pybind11;

namespace {

struct Seen {
    void* stream;
    bool locked;  // whether Python's lock was held
};
std::vector<Seen> seen;

}  // namespace

PYBIND11_MODULE(emulated_kernels, module) {
    actscale::bind_cuda(module);
    module.def("set_limits", [](int multiprocessors, int64_t block, int64_t processor, int64_t reserved, int cluster) {
        emulated::device.limits = {multiprocessors, block, processor, reserved, cluster};
    });
    module.def("set_cluster_room", [](int blocks) { emulated::device.cluster_room = blocks; });
    module.def("set_model", [](int count, int capability, int driver) {
        emulated::device.count = count, emulated::device.capability = capability, emulated::device.driver = driver;
    });
    // From now on, each launch's stream and whether it held Python's lock; `launches_seen` returns them and stops.
    module.def("watch_launches", [] {
        seen.clear();
        emulated::device.observer = [](void* stream) { seen.push_back({stream, PyGILState_Check() == 1}); };
    });
    module.def("launches_seen", [] {
        emulated::device.observer = nullptr;
        py::list found;
        for (const Seen& launch : seen) found.append(py::make_tuple(uintptr_t(launch.stream), launch.locked));
        return found;
    });
    module.def("run_threads_backwards", [](bool reversed) { emulated::device.reversed = reversed; });
    module.def("launches", [] { return emulated::device.launches; });
    // run(address of the kernel in this file, (blocks, blocks_y), threads, cluster, shared, parameter); None: the fibers
    module.def("run_launches_with", [](py::object run) {
        if (run.is_none()) return void(emulated::device.instead = nullptr);
        const py::handle kept = py::object(run).release();  // for good: at the process's end Python is gone first
        emulated::device.instead = [kept](const emulated::Launch& launch) {
            py::gil_scoped_acquire locked;
            Dl_info file;
            dladdr(launch.kernel, &file);
            const auto address = static_cast<const char*>(launch.kernel) - static_cast<const char*>(file.dli_fbase);
            kept(int64_t(address), py::make_tuple(launch.blocks, launch.blocks_y), launch.threads, launch.cluster,
                 launch.shared, py::bytes(launch.call));
        };
    });
}
