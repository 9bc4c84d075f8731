// The norm and the update of the scalars as Python calls them, and 2^x for its test.
#include "bindings.h"

namespace actscale {

void bind_scalars(py::module_& module) {
    module.def("l1_norm", [](Address values, Address sign, Address norm, int64_t count) {
        py::gil_scoped_release release;
        kernels().l1_norm(pointer<float>(values), pointer<float>(sign), pointer<float>(norm), count);
    });

    module.def("proximal_adam", [](int64_t count, Address parameter, Address gradient, Address exp_avg,
                                   Address exp_avg_sq, Address step, double lr, double beta1, double beta2, double eps,
                                   double l1) {
        ProximalAdam c = {count, pointer<float>(parameter), pointer<float>(exp_avg), pointer<float>(exp_avg_sq),
                          pointer<float>(step), pointer<float>(gradient), lr, beta1, beta2, eps, l1};
        unlocked(kernels().proximal_adam, c);
    });

    module.def("powers_of_two", [](Address in, Address out, int64_t count) {
        kernels().powers_of_two(pointer<float>(in), pointer<float>(out), count);
    });
}

}  // namespace actscale
