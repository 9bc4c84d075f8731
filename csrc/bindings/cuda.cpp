// The CUDA launchers as Python calls them, in the submodule `cuda` of an extension that was built with them.
// Nothing is read through a pointer here: ids and factors are values on the device, and the kernels check them.
#ifdef ACTSCALE_CUDA
#include <pybind11/stl.h>

#include "../cuda/kernels.h"
#include "bindings.h"

namespace actscale {
namespace {

void raise(const char* op, cuda::Error error) {
    if (error) throw std::runtime_error(std::string(op) + ": CUDA says: " + error);
}

// Without the interpreter's lock: a launch waits where the queue of its stream is full.
template <class Call> void launch(const char* op, cuda::Error (*run)(const Call&), const Call& call) {
    cuda::Error error = nullptr;
    {
        py::gil_scoped_release release;
        error = run(call);
    }
    raise(op, error);
}

#define LAUNCH(op, Call) \
    void launch_##op(const Arguments& given) { launch(#op, cuda::op, read_##Call(given)); }
LAUNCH(scale_heads, ScaleHeads)
LAUNCH(scale_heads_backward, ScaleHeads)
LAUNCH(dynamic_scale, DynamicScale)
LAUNCH(dynamic_scale_backward, DynamicScale)
LAUNCH(scale_channels, ScaleChannels)
LAUNCH(scale_channels_backward, ScaleChannels)
LAUNCH(intervention_loss, InterventionLoss)
LAUNCH(intervention_loss_scale, InterventionLossScale)
LAUNCH(proximal_adam, ProximalAdam)

std::string text(cuda::Error reason) { return reason ? reason : ""; }

template <class Call> Call shape_of(int type, const py::tuple& sizes) {
    Call c = {};
    int64_t size[4];
    assign(size, sizes);
    c.type = Type(type), c.rows = size[0], c.positions = size[1], c.heads = size[2], c.width = size[3];
    return c;
}

}  // namespace

void bind_cuda(py::module_& parent) {
    py::module_ module = parent.def_submodule("cuda", "CUDA kernels; called by actscale_fast.ops.cuda.");
    module.def("unavailable", [] { return text(cuda::unavailable()); });
    module.def("unavailable_on", [](int device) { return text(cuda::unavailable_on(device)); });
    // The architectures that this build has binaries and PTX of, as 10·major + minor, and the version of its toolkit.
    module.def("archs", [] {
        py::list archs;
        for (int i = 0; i < cuda::built().count; i++) archs.append(cuda::built().archs[i] / 10);
        return archs;
    });
    module.def("toolkit", [] {
        const int version = cuda::built().toolkit;
        return std::to_string(version / 1000) + "." + std::to_string(version / 10 % 100);
    });
    // Why such a build would have no code for such a device, or "".
    module.def("missing_code", [](const std::vector<int>& archs, int toolkit, int capability, int driver) {
        const cuda::DeviceModel model = {capability, driver, "this GPU"};
        return text(cuda::missing_code(model, archs.data(), int(archs.size()), toolkit));
    });
    define<launch_scale_heads>(module, "scale_heads");
    define<launch_scale_heads_backward>(module, "scale_heads_backward");
    define<launch_dynamic_scale>(module, "dynamic_scale");
    define<launch_dynamic_scale_backward>(module, "dynamic_scale_backward");
    define<launch_scale_channels>(module, "scale_channels");
    define<launch_scale_channels_backward>(module, "scale_channels_backward");
    define<launch_intervention_loss>(module, "intervention_loss");
    define<launch_intervention_loss_scale>(module, "intervention_loss_scale_");
    define<launch_proximal_adam>(module, "proximal_adam_");

    // (floats of dalpha's partial sums, floats of dshift's) of the backward pass, on the current device.
    module.def("scale_heads_partials", [](int type, const py::tuple& sizes, bool by_position) {
        auto c = shape_of<ScaleHeads>(type, sizes);
        c.alpha_positions = by_position ? c.positions : 1;
        cuda::PartialSums floats = {};
        raise("scale_heads_backward", cuda::scale_heads_partials(c, &floats));
        return py::make_tuple(floats.dalpha, floats.dshift);
    });
    // Partial sums of the backward pass, on the current device; by_group: whether rows have probes of their own.
    module.def("dynamic_scale_chunks", [](int type, const py::tuple& sizes, bool by_group) {
        int64_t chunks = 0;
        raise("dynamic_scale_backward",
              cuda::dynamic_scale_chunks(shape_of<DynamicScale>(type, sizes), by_group, &chunks));
        return chunks;
    });
    // Partial sums of the backward pass, on the current device.
    module.def("scale_channels_parts", [](int type, int64_t rows, int64_t width) {
        ScaleChannels c = {};
        c.type = Type(type), c.rows = rows, c.width = width;
        int64_t parts = 0;
        raise("scale_channels_backward", cuda::scale_channels_parts(c, &parts));
        return parts;
    });
    // (blocks per row, vectors held, whether the rows stay on chip, bytes of shared memory), as a launch would choose.
    module.def("loss_plan", [](int64_t rows, int64_t vocab, int64_t element_bytes, const py::tuple& limits) {
        const cuda::LossPlan plan =
            cuda::plan_loss(rows, vocab, element_bytes,
                            {limits[0].cast<int>(), limits[1].cast<int64_t>(), limits[2].cast<int64_t>(),
                             limits[3].cast<int64_t>(), limits[4].cast<int>()});
        return py::make_tuple(plan.cluster, plan.capacity, plan.kept, plan.shared);
    });
}

}  // namespace actscale
#endif
