// The CUDA launchers as Python calls them, in the submodule `cuda` of an extension that was built with them.
// Nothing is read through a pointer here: ids and factors are values on the device, and the kernels check them.
#ifdef ACTSCALE_CUDA
#include "../cuda/kernels.h"
#include "bindings.h"

namespace actscale {
namespace {

void raise(const char* op, cuda::Error error) {
    if (error) throw std::runtime_error(std::string(op) + ": CUDA says: " + error);
}

#define LAUNCH(op, Call) \
    void launch_##op(const Arguments& given) { raise(#op, cuda::op(read_##Call(given))); }
LAUNCH(scale_heads, ScaleHeads)
LAUNCH(scale_heads_backward, ScaleHeads)
LAUNCH(dynamic_scale, DynamicScale)
LAUNCH(dynamic_scale_backward, DynamicScale)
LAUNCH(intervention_loss, InterventionLoss)
LAUNCH(intervention_loss_scale, InterventionLossScale)
LAUNCH(proximal_adam, ProximalAdam)

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
    module.def("unavailable", [] {
        const char* reason = cuda::unavailable();
        return std::string(reason ? reason : "");
    });
    define<launch_scale_heads>(module, "scale_heads");
    define<launch_scale_heads_backward>(module, "scale_heads_backward");
    define<launch_dynamic_scale>(module, "dynamic_scale");
    define<launch_dynamic_scale_backward>(module, "dynamic_scale_backward");
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
