// The emulated levels as a library that Python calls through ctypes.
#include <stdlib.h>

#include <new>

#include "cpu/kernels.h"

namespace actscale {

void linear_softmax_of_emulated_pairs(const LinearSoftmax&);
void linear_softmax_of_emulated_tiles(const LinearSoftmax&);
void emulated_dot(const float* sum, const float* a, const float* b, float* out);
void emulated_multiply_tiles(const float* sum, const uint32_t* a, const uint32_t* b, float* out);

namespace {
struct Scratch {
    float* memory = nullptr;
    ~Scratch() { free(memory); }
};
thread_local Scratch own;
}  // namespace

float* scratch(int64_t count) {
    free(own.memory);
    own.memory = static_cast<float*>(aligned_alloc(64, size_t(count + 15) / 16 * 64));
    if (!own.memory) throw std::bad_alloc();
    return own.memory;
}

}  // namespace actscale

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED void run(int64_t tiles, int64_t type, int64_t rows, int64_t vocab, int64_t width, const void* hidden,
                  int64_t hidden_stride, const void* weight, int64_t weight_stride, const float* bias,
                  const int64_t* correct, const int64_t* wrong, int64_t exclude_answers, float scale, int64_t bytes,
                  double* log_sum, float* mean, double* mean_bias, float* answers, int64_t threads) {
    actscale::LinearSoftmax c = {};
    c.type = actscale::Type(type), c.rows = rows, c.vocab = vocab, c.width = width;
    c.hidden = hidden, c.weight = weight, c.hidden_stride = hidden_stride, c.weight_stride = weight_stride;
    c.bias = bias, c.correct = correct, c.wrong = wrong, c.exclude_answers = exclude_answers != 0;
    c.scale = scale, c.bytes = bytes, c.log_sum = log_sum, c.mean = mean, c.mean_bias = mean_bias;
    c.answers = answers, c.threads = int(threads);
    tiles ? actscale::linear_softmax_of_emulated_tiles(c) : actscale::linear_softmax_of_emulated_pairs(c);
}

EXPORTED void dot(const float* sum, const float* a, const float* b, float* out) {
    actscale::emulated_dot(sum, a, b, out);
}

EXPORTED void multiply_tiles(const float* sum, const uint32_t* a, const uint32_t* b, float* out) {
    actscale::emulated_multiply_tiles(sum, a, b, out);
}
