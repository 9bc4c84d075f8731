// The update of the scalars as Python calls it, and 2^x for its test.
#include "bindings.h"

namespace actscale {
namespace {

void run(const Arguments& given) { unlocked(kernels().proximal_adam, read_ProximalAdam(given)); }

}  // namespace

void bind_proximal_adam(py::module_& module) {
    define<run>(module, "proximal_adam_");
    module.def("powers_of_two", [](uintptr_t in, uintptr_t out, int64_t count) {
        kernels().powers_of_two(reinterpret_cast<float*>(in), reinterpret_cast<float*>(out), count);
    });
}

}  // namespace actscale
