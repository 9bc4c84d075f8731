// The CUDA launchers as Python calls them, in the submodule `cuda` of an extension that was built with them.
// Nothing is read through a pointer here: ids and factors are values on the device, and the kernels mind them.
#ifdef ACTSCALE_CUDA
#include "bindings.h"
#include "../cuda/kernels.h"

namespace actscale {
namespace {

void* stream_of(Address stream) { return reinterpret_cast<void*>(stream); }

void raise(const char* op, cuda::Error error) {
    if (error) throw std::runtime_error(std::string(op) + ": CUDA says: " + error);
}

cuda::Limits limits_from(const py::tuple& values) {
    return {values[0].cast<int>(), values[1].cast<int64_t>(), values[2].cast<int64_t>(), values[3].cast<int64_t>(),
            values[4].cast<int>()};
}

void bind_cuda_loss(py::module_& module) {
    module.def("intervention_loss", [](int type, int64_t rows, int64_t vocab, Address logits, int64_t logits_stride,
                                       Address reference, int64_t reference_stride, Address correct, Address wrong,
                                       Address direction, Address row_weight, float margin, float inverse_temperature,
                                       float softcap, bool exclude_answers, bool reverse, Address effectiveness,
                                       Address faithfulness, Address grad, Address answer_grad, Address scalars,
                                       bool has_scalars, int64_t n_scalars, Address l1, Address sign, Address stream) {
        const InterventionLoss c = loss_call(type, rows, vocab, logits, logits_stride, reference,
                                             reference_stride, correct, wrong, direction, row_weight, margin,
                                             inverse_temperature, softcap, exclude_answers, reverse, effectiveness,
                                             faithfulness, grad, answer_grad);
        const cuda::Scalars s = {has_scalars, pointer<float>(scalars), n_scalars, pointer<float>(l1),
                                 pointer<float>(sign)};
        raise("intervention_loss", cuda::intervention_loss(c, s, stream_of(stream)));
    });

    module.def("scale_gradient", [](int type, int64_t rows, int64_t vocab, Address grad, Address d_effectiveness,
                                    int64_t d_effectiveness_stride, Address d_faithfulness,
                                    int64_t d_faithfulness_stride, Address correct, Address wrong, Address answer_grad,
                                    Address stream) {
        const ScaleGradient c = scale_gradient_call(type, rows, vocab, grad, d_effectiveness,
                                                    d_effectiveness_stride, d_faithfulness,
                                                    d_faithfulness_stride, correct, wrong, answer_grad);
        raise("intervention_loss_scale_", cuda::scale_gradient(c, stream_of(stream)));
    });

    // (blocks a row, vectors held, whether the rows stay on chip, bytes of shared memory), as a launch would choose.
    module.def("loss_plan", [](int64_t rows, int64_t vocab, int64_t element_bytes, py::tuple limits) {
        const cuda::LossPlan plan = cuda::plan_loss(rows, vocab, element_bytes, limits_from(limits));
        return py::make_tuple(plan.cluster, plan.capacity, plan.kept, plan.shared);
    });
}

ScaleHeads scale_heads_call(int type, const py::tuple& sizes, const py::tuple& groups) {
    ScaleHeads c = {};
    int64_t values[4];
    copy(sizes, values);
    c.type = Type(type);
    c.rows = values[0], c.positions = values[1], c.heads = values[2], c.width = values[3];
    c.groups = groups[0].cast<int64_t>();
    c.alpha_positions = groups[1].cast<int64_t>(), c.shift_positions = groups[2].cast<int64_t>();
    return c;
}

void bind_cuda_scaling(py::module_& module) {
    module.def("scale_heads", [](int type, py::tuple sizes, Address x, py::tuple x_stride, Address y,
                                 py::tuple y_stride, Address alpha, Address shift, py::tuple groups, float strength,
                                 Address row_strength, Address group, Address stream) {
        ScaleHeads c = scale_heads_call(type, sizes, groups);
        c.x = pointer<void>(x), c.out = pointer<void>(y);
        copy(x_stride, c.x_stride), copy(y_stride, c.out_stride);
        c.alpha = pointer<float>(alpha), c.shift = pointer<float>(shift), c.strength = strength;
        c.row_strength = pointer<float>(row_strength), c.group = pointer<int64_t>(group);
        raise("scale_heads", cuda::scale_heads(c, stream_of(stream)));
    });

    // (floats of dalpha's partial sums, floats of dshift's) of the backward pass, on the current device.
    module.def("scale_heads_partials", [](int type, py::tuple sizes, py::tuple groups) {
        cuda::PartialSums floats = {};
        raise("scale_heads_backward", cuda::scale_heads_partials(scale_heads_call(type, sizes, groups), &floats));
        return py::make_tuple(floats.dalpha, floats.dshift);
    });

    module.def("scale_heads_backward", [](int type, py::tuple sizes, Address dy, py::tuple dy_stride, Address x,
                                          py::tuple x_stride, Address dx, py::tuple dx_stride, Address alpha,
                                          py::tuple groups, float strength, Address row_strength, Address group,
                                          Address dalpha, Address dalpha_partial, Address dshift,
                                          Address dshift_partial, Address stream) {
        ScaleHeads c = scale_heads_call(type, sizes, groups);
        c.dy = pointer<void>(dy), c.x = pointer<void>(x), c.out = pointer<void>(dx);
        copy(dy_stride, c.dy_stride), copy(x_stride, c.x_stride);
        if (dx) copy(dx_stride, c.out_stride);
        c.alpha = pointer<float>(alpha), c.strength = strength;
        c.row_strength = pointer<float>(row_strength), c.group = pointer<int64_t>(group);
        c.dalpha = pointer<float>(dalpha), c.dshift = pointer<float>(dshift);
        raise("scale_heads_backward", cuda::scale_heads_backward(c, pointer<float>(dalpha_partial),
                                                                 pointer<float>(dshift_partial), stream_of(stream)));
    });
}

DynamicScale dynamic_scale_call(int type, const py::tuple& sizes, int64_t groups, Address group) {
    DynamicScale c = {};
    int64_t values[4];
    copy(sizes, values);
    c.type = Type(type);
    c.rows = values[0], c.positions = values[1], c.heads = values[2], c.width = values[3];
    c.groups = groups, c.group = pointer<int64_t>(group);
    return c;
}

void bind_cuda_dynamic(py::module_& module) {
    module.def("dynamic_scale", [](int type, py::tuple sizes, Address x, py::tuple x_stride, Address y,
                                   py::tuple y_stride, Address weight, Address bias, Address scalars, int64_t groups,
                                   float strength, Address row_strength, Address group, Address stream) {
        DynamicScale c = dynamic_scale_call(type, sizes, groups, group);
        c.x = pointer<void>(x), c.out = pointer<void>(y);
        copy(x_stride, c.x_stride), copy(y_stride, c.out_stride);
        c.weight = pointer<float>(weight), c.bias = pointer<float>(bias), c.scalars = pointer<float>(scalars);
        c.strength = strength, c.row_strength = pointer<float>(row_strength);
        raise("dynamic_scale", cuda::dynamic_scale(c, stream_of(stream)));
    });

    // Partial sums of the backward pass, on the current device; by_group: whether rows have probes of their own.
    module.def("dynamic_scale_chunks", [](int type, py::tuple sizes, bool by_group) {
        int64_t chunks = 0;
        const DynamicScale c = dynamic_scale_call(type, sizes, 1, by_group);  // not read
        raise("dynamic_scale_backward", cuda::dynamic_scale_chunks(c, &chunks));
        return chunks;
    });

    module.def("dynamic_scale_backward", [](int type, py::tuple sizes, Address dy, py::tuple dy_stride,
                                            Address d_scalars, py::tuple d_scalars_stride, Address x,
                                            py::tuple x_stride, Address dx, py::tuple dx_stride, Address weight,
                                            Address scalars, int64_t groups, float strength, Address row_strength,
                                            Address group, Address dweight, Address dweight_partial, Address dbias,
                                            Address dbias_partial, Address stream) {
        DynamicScale c = dynamic_scale_call(type, sizes, groups, group);
        c.dy = pointer<void>(dy), c.d_scalars = pointer<float>(d_scalars);
        c.x = pointer<void>(x), c.out = pointer<void>(dx);
        copy(dy_stride, c.dy_stride), copy(d_scalars_stride, c.d_scalars_stride), copy(x_stride, c.x_stride);
        if (dx) copy(dx_stride, c.out_stride);
        c.weight = pointer<float>(weight), c.scalars = pointer<float>(scalars);
        c.strength = strength, c.row_strength = pointer<float>(row_strength);
        c.dweight = pointer<float>(dweight), c.dbias = pointer<float>(dbias);
        raise("dynamic_scale_backward",
              cuda::dynamic_scale_backward(c, pointer<float>(dweight_partial), pointer<float>(dbias_partial),
                                           stream_of(stream)));
    });
}

void bind_cuda_scalars(py::module_& module) {
    module.def("proximal_adam", [](int64_t count, Address parameter, Address gradient, Address exp_avg,
                                   Address exp_avg_sq, Address step, double lr, double beta1, double beta2, double eps,
                                   double l1, Address stream) {
        const ProximalAdam c = {count, pointer<float>(parameter), pointer<float>(exp_avg), pointer<float>(exp_avg_sq),
                                pointer<float>(step), pointer<float>(gradient), lr, beta1, beta2, eps, l1};
        raise("proximal_adam_", cuda::proximal_adam(c, stream_of(stream)));
    });
}

}  // namespace

void bind_cuda(py::module_& parent) {
    py::module_ module = parent.def_submodule("cuda", "CUDA kernels; called by actscale_fast.ops.cuda.");
    module.def("unavailable", [] {
        const char* reason = cuda::unavailable();
        return std::string(reason ? reason : "");
    });
    bind_cuda_loss(module);
    bind_cuda_scaling(module);
    bind_cuda_dynamic(module);
    bind_cuda_scalars(module);
}

}  // namespace actscale
#endif
