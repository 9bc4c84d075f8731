// Every CUDA kernel over buffers of their exact size, for a run under the address and undefined-behaviour sanitizers:
// a read or write beyond a tensor, an access off its natural alignment or an overflow ends the program.
#include <stdio.h>

#include <initializer_list>
#include <vector>

#include "cuda/device.h"

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

void check(const char* error) {
    if (error) fprintf(stderr, "%s\n", error), exit(2);
}

template <class T> void losses(Type type, int64_t rows, int64_t vocab, int64_t off, bool reverse) {
    Buffer<T> z(rows * vocab, T(1), off), r(rows * vocab, T(2), off + 1), grad(rows * vocab, T(3), 1 - off % 2);
    Buffer<int64_t> correct(rows, 0), wrong(rows, vocab - 1);
    Buffer<float> direction(rows, 1), e(rows), f(rows), answers(3 * rows), upstream(1, 2);
    Buffer<float> alpha(37, -1), l1(1), sign(37);
    if (rows > 1) correct.at()[1] = vocab, wrong.at()[1] = -7;
    InterventionLoss c = {};
    c.type = type, c.rows = rows, c.vocab = vocab, c.logits = z.at(), c.reference = r.at();
    c.logits_stride = c.reference_stride = vocab;
    c.correct = correct.at(), c.wrong = wrong.at(), c.direction = direction.at();
    c.margin = 1, c.inverse_temperature = 0.5f, c.exclude_answers = true, c.reverse = reverse;
    c.effectiveness = e.at(), c.faithfulness = f.at(), c.grad = grad.at(), c.answer_grad = answers.at();
    c.scalars = alpha.at(), c.n_scalars = 37, c.l1 = l1.at(), c.sign = sign.at();
    check(cuda::intervention_loss(c));
    InterventionLossScale s = {};
    s.type = type, s.rows = rows, s.vocab = vocab, s.grad = grad.at(), s.answer_grad = answers.at();
    s.d_effectiveness = s.d_faithfulness = upstream.at(), s.correct = correct.at(), s.wrong = wrong.at();
    check(cuda::intervention_loss_scale(s));
    Buffer<float> weight(rows, 0.5f);
    weight.at()[rows - 1] = 0;
    c.correct = c.wrong = nullptr, c.row_weight = weight.at(), c.softcap = 5, c.l1 = nullptr;
    check(cuda::intervention_loss(c));
}

template <class T> void heads(Type type, int64_t B, int64_t P, int64_t H, int64_t D, int64_t positions, int64_t off) {
    const int64_t count = B * P * H * D;
    Buffer<T> x(count, T(1), off), dy(count, T(2), off), out(count, T(3), off);
    Buffer<float> alpha(2 * positions * H, 0.5f), shift(2 * positions * H * D, 1), beta(B, 2);
    Buffer<float> dalpha(2 * positions * H), dshift(2 * positions * H * D);
    Buffer<float> weight(2 * H * D, 1), bias(2 * H), scalars(B * P * H), dbias(2 * H);
    Buffer<int64_t> group(B, 1);
    if (B > 1) group.at()[1] = 2;
    ScaleHeads c = {};
    c.type = type, c.rows = B, c.positions = P, c.heads = H, c.width = D, c.groups = 2, c.strength = -1;
    c.x = x.at(), c.dy = dy.at(), c.out = out.at(), c.alpha = alpha.at(), c.shift = shift.at();
    for (int64_t* stride : {c.x_stride, c.dy_stride, c.out_stride})
        stride[0] = P * H * D, stride[1] = H * D, stride[2] = D;
    c.alpha_positions = c.shift_positions = positions, c.row_strength = beta.at(), c.group = group.at();
    check(cuda::scale_heads(c));
    cuda::PartialSums floats;
    check(cuda::scale_heads_partials(c, &floats));
    Buffer<float> dalpha_partial(floats.dalpha), dshift_partial(floats.dshift);
    c.dalpha = dalpha.at(), c.dshift = dshift.at();
    c.dalpha_partial = dalpha_partial.at(), c.dshift_partial = dshift_partial.at();
    check(cuda::scale_heads_backward(c));
    c.out = nullptr, c.dalpha_partial = nullptr;
    check(cuda::scale_heads_backward(c));

    DynamicScale d = {};
    d.type = type, d.rows = B, d.positions = P, d.heads = H, d.width = D, d.groups = 2, d.strength = -1;
    d.x = x.at(), d.dy = dy.at(), d.out = out.at(), d.weight = weight.at(), d.bias = bias.at();
    for (int64_t* stride : {d.x_stride, d.dy_stride, d.out_stride})
        stride[0] = P * H * D, stride[1] = H * D, stride[2] = D;
    d.scalars = scalars.at(), d.row_strength = beta.at(), d.group = group.at();
    check(cuda::dynamic_scale(d));
    int64_t chunks = 0;
    check(cuda::dynamic_scale_chunks(d, true, &chunks));
    Buffer<float> dweight(2 * H * D), dweight_partial(chunks * H * D), dbias_partial(chunks * H);
    d.dweight = dweight.at(), d.dbias = dbias.at(), d.d_scalars = scalars.at();
    d.d_scalars_stride[0] = P * H, d.d_scalars_stride[1] = H, d.d_scalars_stride[2] = 1;
    d.dweight_partial = dweight_partial.at(), d.dbias_partial = dbias_partial.at();
    check(cuda::dynamic_scale_backward(d));
}

template <class T> void channels(Type type, int64_t rows, int64_t width, int64_t off) {
    Buffer<T> x(rows * width, T(1), off), dy(rows * width, T(2), off), out(rows * width, T(3), off);
    Buffer<float> weight(width, 0.5f), dweight(width);
    ScaleChannels c = {};
    c.type = type, c.rows = rows, c.width = width, c.x_stride = c.dy_stride = width;
    c.x = x.at(), c.dy = dy.at(), c.out = out.at(), c.weight = weight.at(), c.dweight = dweight.at();
    check(cuda::scale_channels(c));
    int64_t parts = 0;
    check(cuda::scale_channels_parts(c, &parts));
    Buffer<float> partial(parts * width);
    c.dweight_partial = partial.at();
    check(cuda::scale_channels_backward(c));
}

template <class T> void all(Type type) {
    for (int64_t vocab : {1, 2, 3, 31, 257})
        for (int64_t off : {0, 1, 3}) losses<T>(type, 2, vocab, off, off % 2);
    for (int64_t off : {0, 1}) {
        channels<T>(type, 7, 16, off), channels<T>(type, 200, 5, off), channels<T>(type, 2, 2099, off);
        heads<T>(type, 2, 3, 2, 16, 1, off);
        heads<T>(type, 2, 3, 3, 5, 3, off);
        heads<T>(type, 1, 2, 1, 2099, 1, off);
    }
}

}  // namespace

int main() {
    for (int64_t block : {232448, 1536}) {  // roomy, and so small that 257 columns need a cluster
        emulated::device.limits = {2, block, 2 * (block + 1024), 1024, 16};
        losses<float>(Type::float32, 2, 257, 1, false), losses<uint16_t>(Type::bfloat16, 3, 401, 2, true);
        if (block < 4096) continue;
        all<float>(Type::float32), all<uint16_t>(Type::bfloat16), all<uint16_t>(Type::float16);
    }
    emulated::device.limits = {1, 512 + 2 * 16 * 3 * 1024, 233472, 1024, 1};  // no cluster holds the row: read twice
    losses<uint16_t>(Type::bfloat16, 1, 26001, 1, false);
    ProximalAdam c = {};
    for (int64_t count : {7, 17000}) {
        Buffer<float> parameter(count, 1), mean(count), square(count), gradient(count, 1), step(1);
        c = {count, parameter.at(), mean.at(), square.at(), step.at(), gradient.at(), 0.1, 0.9, 0.999, 1e-8, 0};
        check(cuda::proximal_adam(c));
        if (*step.at() != 1) return 3;
    }
    puts("within bounds");
    return 0;
}
