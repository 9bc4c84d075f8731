// linear_softmax as Python calls it.
#include "bindings.h"

namespace actscale {

void bind_linear(py::module_& module) {
    module.def("linear_softmax", [](int type, int64_t rows, int64_t vocab, int64_t width, Address hidden,
                                    int64_t hidden_stride, Address weight, int64_t weight_stride, Address bias,
                                    Address correct, Address wrong, bool exclude_answers, float scale, int64_t bytes,
                                    Address log_sum, Address mean, Address mean_bias, Address answers, int threads) {
        LinearSoftmax c = {};
        c.type = Type(type), c.rows = rows, c.vocab = vocab, c.width = width;
        c.hidden = pointer<void>(hidden), c.hidden_stride = hidden_stride;
        c.weight = pointer<void>(weight), c.weight_stride = weight_stride;
        c.bias = pointer<float>(bias), c.correct = pointer<int64_t>(correct), c.wrong = pointer<int64_t>(wrong);
        c.exclude_answers = exclude_answers, c.scale = scale, c.bytes = bytes, c.threads = threads;
        c.log_sum = pointer<double>(log_sum), c.mean_bias = pointer<double>(mean_bias);
        c.mean = pointer<float>(mean), c.answers = pointer<float>(answers);
        if (c.correct) check_ids("correct", c.correct, rows, vocab, "token id");
        if (c.wrong) check_ids("wrong", c.wrong, rows, vocab, "token id");
        unlocked(kernels().linear_softmax, c);
    });
}

}  // namespace actscale
