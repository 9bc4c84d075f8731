// Every C++ kernel, at every level that the processor has, over buffers of their exact size, for a run under the address
// and undefined-behaviour sanitizers: a read or write beyond a tensor or the scratch memory, an access off its natural
// alignment or an overflow ends the program.
#include <stdio.h>
#include <stdlib.h>

#include <initializer_list>
#include <memory>
#include <vector>

#include "cpu/kernels.h"

namespace actscale {

#if defined(__x86_64__)
void linear_softmax_of_emulated_pairs(const LinearSoftmax& c);  // helpers/emulated_level_sources
void linear_softmax_of_emulated_tiles(const LinearSoftmax& c);
#endif

// Of its exact size, and fresh for every call.
thread_local std::unique_ptr<float, void (*)(void*)> own(nullptr, free);
float* scratch(int64_t count) {
    own.reset();
    own.reset(static_cast<float*>(aligned_alloc(64, size_t(count + 15) / 16 * 64)));
    return own.get();
}
void release_scratch(int64_t) { own.reset(); }

}  // namespace actscale

namespace {

using namespace actscale;

template <class T> struct Buffer {  // `shift` elements off the grid on which malloc begins
    std::vector<T> memory;
    int64_t shift;
    explicit Buffer(int64_t count, T value = {}, int64_t off = 0) : memory(count + off, value), shift(off) {
        memory.shrink_to_fit();
    }
    T* at() { return memory.data() + shift; }
};

template <class T>
void losses(const Kernels& run, Type type, int64_t rows, int64_t vocab, int64_t off, bool reverse, int threads) {
    Buffer<T> z(rows * vocab, T(1), off), r(rows * vocab, T(2), off + 1), grad(rows * vocab, T(3), 1 - off % 2);
    Buffer<int64_t> correct(rows, 0), wrong(rows, vocab - 1);
    Buffer<float> direction(rows, 1), e(rows), f(rows), answers(3 * rows), upstream(1, 2);
    Buffer<float> alpha(37, -1), l1(1), sign(37), weight(rows, 0.5f);
    InterventionLoss c = {};
    c.type = type, c.rows = rows, c.vocab = vocab, c.logits = z.at(), c.reference = r.at();
    c.logits_stride = c.reference_stride = vocab, c.threads = threads;
    c.correct = correct.at(), c.wrong = wrong.at(), c.direction = direction.at();
    c.margin = 1, c.inverse_temperature = 0.5f, c.exclude_answers = true, c.reverse = reverse;
    c.effectiveness = e.at(), c.faithfulness = f.at(), c.grad = grad.at(), c.answer_grad = answers.at();
    c.scalars = alpha.at(), c.n_scalars = 37, c.l1 = l1.at(), c.sign = sign.at();
    run.intervention_loss(c);
    InterventionLossScale s = {};
    s.type = type, s.rows = rows, s.vocab = vocab, s.grad = grad.at(), s.answer_grad = answers.at();
    s.d_effectiveness = s.d_faithfulness = upstream.at(), s.correct = correct.at(), s.wrong = wrong.at();
    s.threads = threads;
    run.intervention_loss_scale(s);
    weight.at()[rows - 1] = 0;
    c.correct = c.wrong = nullptr, c.row_weight = weight.at(), c.softcap = 5, c.l1 = nullptr;
    run.intervention_loss(c);
    c.grad = nullptr, c.answer_grad = nullptr, c.softcap = 0;
    run.intervention_loss(c);
}

template <class T> void heads(const Kernels& run, Type type, int64_t B, int64_t P, int64_t H, int64_t D,
                              int64_t positions, int64_t off, int threads) {
    const int64_t count = B * P * H * D, groups = 2;
    Buffer<T> x(count, T(1), off), dy(count, T(2), off), out(count, T(3), off);
    Buffer<float> alpha(groups * positions * H, 0.5f), shift(groups * positions * H * D, 1), beta(B, 2);
    Buffer<float> dalpha(groups * positions * H), dshift(groups * positions * H * D);
    Buffer<float> weight(groups * H * D, 1), bias(groups * H), scalars(B * P * H), dbias(groups * H);
    Buffer<float> dweight(groups * H * D), factors(D, 1), dfactors(D);
    Buffer<int64_t> group(B, 1);
    ScaleHeads c = {};
    c.type = type, c.rows = B, c.positions = P, c.heads = H, c.width = D, c.groups = groups, c.strength = -1;
    c.x = x.at(), c.dy = dy.at(), c.out = out.at(), c.alpha = alpha.at(), c.shift = shift.at(), c.threads = threads;
    for (int64_t* stride : {c.x_stride, c.dy_stride, c.out_stride})
        stride[0] = P * H * D, stride[1] = H * D, stride[2] = D;
    c.dy_stride[3] = 1;
    c.alpha_positions = c.shift_positions = positions, c.row_strength = beta.at(), c.group = group.at();
    run.scale_heads(c);
    c.dalpha = dalpha.at(), c.dshift = dshift.at();
    run.scale_heads_backward(c);
    c.out = nullptr, c.dalpha = nullptr;
    run.scale_heads_backward(c);
    c.out = out.at(), c.dshift = nullptr, c.shift = nullptr;
    for (int64_t& stride : c.dy_stride) stride = 0;  // the gradient of a sum
    run.scale_heads_backward(c);

    DynamicScale d = {};
    d.type = type, d.rows = B, d.positions = P, d.heads = H, d.width = D, d.groups = groups, d.strength = -1;
    d.x = x.at(), d.dy = dy.at(), d.out = out.at(), d.weight = weight.at(), d.bias = bias.at(), d.threads = threads;
    for (int64_t* stride : {d.x_stride, d.dy_stride, d.out_stride})
        stride[0] = P * H * D, stride[1] = H * D, stride[2] = D;
    d.dy_stride[3] = 1;
    d.scalars = scalars.at(), d.row_strength = beta.at(), d.group = group.at();
    run.dynamic_scale(d);
    d.dweight = dweight.at(), d.dbias = dbias.at(), d.d_scalars = scalars.at();
    d.d_scalars_stride[0] = P * H, d.d_scalars_stride[1] = H, d.d_scalars_stride[2] = 1;
    run.dynamic_scale_backward(d);
    d.out = nullptr, d.dbias = nullptr;
    run.dynamic_scale_backward(d);

    ScaleChannels s = {};
    s.type = type, s.rows = B * P * H, s.width = D, s.x = x.at(), s.dy = dy.at(), s.out = out.at();
    s.x_stride = s.dy_stride = D, s.weight = factors.at(), s.threads = threads;
    run.scale_channels(s);
    s.dweight = dfactors.at();
    run.scale_channels_backward(s);
    s.out = nullptr;
    run.scale_channels_backward(s);
}

template <class T>
void softmax(const Kernels& run, Type type, int64_t rows, int64_t vocab, int64_t width, int64_t off, int threads) {
    Buffer<T> hidden(rows * width, T(1), off), weight(vocab * width, T(2), off);
    Buffer<float> bias(vocab, 1), mean(rows * width), answers(2 * rows);
    Buffer<int64_t> correct(rows, 0), wrong(rows, vocab - 1);
    Buffer<double> log_sum(rows), mean_bias(rows);
    LinearSoftmax c = {};
    c.type = type, c.rows = rows, c.vocab = vocab, c.width = width, c.hidden = hidden.at(), c.weight = weight.at();
    c.hidden_stride = c.weight_stride = width, c.bias = bias.at(), c.scale = 0.5f, c.bytes = 1 << 20;
    c.log_sum = log_sum.at(), c.mean = mean.at(), c.mean_bias = mean_bias.at(), c.threads = threads;
    run.linear_softmax(c);
    c.correct = correct.at(), c.wrong = wrong.at(), c.answers = answers.at(), c.exclude_answers = true, c.bytes = 1;
    run.linear_softmax(c);
}

template <class T> void softmaxes(const Kernels& run, Type type, int64_t off, int threads) {
    softmax<T>(run, type, 3, 31, 5, off, threads);
    softmax<T>(run, type, 70, 9001, 24, off, threads);
    softmax<T>(run, type, 2, 300, 1, off, threads);
    softmax<T>(run, type, 17, 320, 64, off, threads);
    softmax<T>(run, type, 2, 5, 0, off, threads);
}

template <class T> void all(const Kernels& run, Type type) {
    for (int threads : {1, 3}) {
        for (int64_t vocab : {1, 2, 3, 31, 257, 9001})
            for (int64_t off : {0, 1, 3}) losses<T>(run, type, 3, vocab, off, off % 2, threads);
        for (int64_t off : {0, 1}) {
            heads<T>(run, type, 2, 3, 2, 16, 1, off, threads);
            heads<T>(run, type, 2, 3, 3, 5, 3, off, threads);
            heads<T>(run, type, 4, 70, 9, 65, 1, off, threads);
            heads<T>(run, type, 1, 2, 1, 2099, 1, off, threads);
            softmax<T>(run, type, 3, 31, 5, off, threads);
            softmax<T>(run, type, 70, 9001, 24, off, threads);
        }
    }
    losses<T>(run, type, 44, 30011, 1, false, 3);  // its gradient bypasses the cache
}

std::vector<const Kernels*> levels() {
    std::vector<const Kernels*> found = {&portable_kernels()};
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&avx2_kernels());
    if (__builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"))
        found.push_back(&avx512_kernels());
#endif
    return found;
}

}  // namespace

int main() {
    for (const Kernels* run : levels()) {
        all<float>(*run, Type::float32), all<uint16_t>(*run, Type::bfloat16), all<uint16_t>(*run, Type::float16);
        for (int64_t count : {1, 7, 4099}) {
            Buffer<float> parameter(count, 1), mean(count), square(count), gradient(count, 1), step(1);
            ProximalAdam c = {};
            c.count = count, c.parameter = parameter.at(), c.gradient = gradient.at(), c.step = step.at();
            c.exp_avg = mean.at(), c.exp_avg_sq = square.at(), c.lr = 0.1, c.beta1 = 0.9, c.beta2 = 0.999, c.eps = 1e-8;
            run->proximal_adam(c);
            if (*step.at() != 1) return 3;
        }
        printf("%s: within bounds\n", run->level);
    }
#if defined(__x86_64__)
    if (levels().size() > 1) {
        Kernels pairs = avx2_kernels(), tiles = pairs;
        pairs.linear_softmax = linear_softmax_of_emulated_pairs;
        tiles.linear_softmax = linear_softmax_of_emulated_tiles;
        for (int threads : {1, 3})
            for (int64_t off : {0, 1, 3}) {
                softmaxes<uint16_t>(pairs, Type::bfloat16, off, threads);
                softmaxes<uint16_t>(tiles, Type::bfloat16, off, threads);
                softmaxes<uint16_t>(tiles, Type::float16, off, threads);
                softmaxes<float>(tiles, Type::float32, off, threads);
            }
        printf("avx512_bf16 and avx512_amx, emulated: within bounds\n");
    }
#endif
    release_scratch(0);
    return 0;
}
