// Effectiveness and faithfulness of an intervention, and the gradient of both, from two rows of logits.
//
// z the logits, r the reference logits, i the inverse temperature, q = softmax(i·z), p = softmax(i·r) over the columns
// that are kept (all, or all but the answers c and w), s = ±1 the direction:
//   effectiveness E = max(0, m − s·(z[c] − z[w]))     dE/dz[c] = −s where E > 0, dE/dz[w] = s where E > 0
//   faithfulness  F = Σ p (log p − log q)             dF/dz = i·(q − p)
//                 F = Σ q (log q − log p)  (reverse)  dF/dz = i·q·(log q − log p − F)
// With answers on request: weights w_E, w_F of rows in the gradient alone, which becomes that of w_E·E + w_F·F.
// Without answers on request: weights of rows, w·F and w·dF/dz, and a soft-cap of both sides' logits, whose slope is a
// factor of the gradient. A row of weight 0 is not read, its gradient is written as zeros.
// The sums behind F and dF/dz are those of softmaxes.h. Saved for backward: the gradient and three numbers per row.
//
// The two rows stay on chip: each logit is read once and each gradient written once, 3·b bytes per logit of b bytes
// (2·b without the gradient). A row belongs to one block or to a thread-block cluster whose blocks hold a share each in
// shared memory and add up their sums over distributed shared memory, in the order of their ranks. A thread scans and
// differentiates the vectors it copied itself, so the copies need no barrier, and AHEAD steps of them are under way
// while it works. Rows that no cluster can hold are read a second time, backwards, through the same slots used as a
// ring: 5·b bytes, of which up to 2·b from L2. That also serves GPUs without clusters (sm_80). The scalars' ‖α‖₁ and
// sign(α) are the first cluster of the launch. The gradient may overwrite the logits: a thread writes the vectors that
// it alone has read, and the answers' logits, which all read, are in registers before the first barrier.
//
// Tested under emulation and compiled for sm_80, sm_90 and sm_100. Not run on a GPU yet; no launch constant is
// measured.
#include "launch.h"
#include "loss_share.h"

namespace actscale {
namespace cuda {
namespace {

constexpr int64_t SCRATCH_FLOATS = 128;  // 5 a warp, 5 of this block, 5 of each of up to 16 blocks
constexpr int64_t SCRATCH = SCRATCH_FLOATS * 4;
constexpr int WARPS_AT = 0, MINE_AT = 5 * WARPS, ALL_AT = MINE_AT + 8;
static_assert(ALL_AT + SUMS * 16 <= SCRATCH_FLOATS, "scratch");

struct Call {
    InterventionLoss loss;
    LossPlan plan;
    bool nothing_left;  // V = 0, or V ≤ 2 without the answers: F = 0
};

DEVICE void norm_of_scalars(const InterventionLoss& c, float* scratch) {
    float total = 0;
    for (int64_t i = threadIdx.x; i < c.n_scalars; i += THREADS) {
        const float value = c.scalars[i];
        total += fabsf(value);
        if (c.sign) c.sign[i] = float(value > 0) - float(value < 0);
    }
    total = warp_sum(total);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = total;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < WARPS; i++) total += scratch[i];
        *c.l1 = total;
    }
}

template <class T> DEVICE Share<T> share_of(const Call& call, int64_t row, int rank) {
    constexpr int W = WIDTH<T>;
    const InterventionLoss& c = call.loss;
    const T* logits = static_cast<const T*>(c.logits) + row * c.logits_stride;
    const T* reference = static_cast<const T*>(c.reference) + row * c.reference_stride;
    Share<T> s;
    s.w = c.reverse ? logits : reference, s.o = c.reverse ? reference : logits;
    s.grad = c.grad ? static_cast<T*>(c.grad) + row * c.vocab : nullptr;
    s.vocab = int(c.vocab);
    const int shift = off_grid(c.grad ? s.grad : logits);
    s.w_on_grid = off_grid(s.w) == shift, s.o_on_grid = off_grid(s.o) == shift;
    const int vectors = c.vocab ? (s.vocab + shift + W - 1) / W : 0;
    const int each = (vectors + call.plan.cluster - 1) / call.plan.cluster, first = rank * each;
    s.first_column = first * W - shift;
    s.count = vectors - first < each ? vectors - first : each;  // may be below 0
    s.steps = s.count > 0 ? (s.count + STEP<T> - 1) / STEP<T> : 0;
    const int whole = s.count > 0 ? (s.vocab - s.first_column) / W : 0;  // the row's last vector may be a part
    s.inside_from = s.first_column < 0;
    s.inside_to = s.w_on_grid && s.o_on_grid ? (whole < s.count ? whole : s.count) / STEP<T> : 0;
    s.slots_w = reinterpret_cast<Vector*>(dynamic_shared() + SCRATCH);
    s.slots_o = s.slots_w + call.plan.capacity;
    return s;
}

template <class T> DEVICE void find_answers(Share<T>& s, const int64_t (&answers)[2], bool exclude) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int from_first = int(answers[i]) - s.first_column;
        const bool here = answers[i] >= 0 && from_first >= 0 && from_first < s.count * WIDTH<T>;
        s.answers[i] = here ? from_first / WIDTH<T> : -1;
        s.columns[i] = here ? from_first % WIDTH<T> : 0;
        s.answers_in[i] = here ? s.answers[i] / STEP<T> : -1;
        s.hidden_in[i] = exclude ? s.answers_in[i] : -1;
    }
}

template <class T, bool CAPPED>
__global__ void __launch_bounds__(THREADS, RESIDENT) intervention_loss_kernel(const Call call) {
    const InterventionLoss& c = call.loss;
    const int blocks = call.plan.cluster, rank = int(blockIdx.x % blocks);
    float* scratch = reinterpret_cast<float*>(dynamic_shared());
    int64_t row = blockIdx.x / blocks;
    if (c.l1) {
        if (row == 0) {
            if (rank == 0) norm_of_scalars(c, scratch);
            return;
        }
        row--;
    }

    const float scale = c.inverse_temperature * LOG2E, weight = c.row_weight ? c.row_weight[row] : 1.0f;
    const Cap cap = {2 * LOG2E / c.softcap, c.softcap};
    Share<T> share = share_of<T>(call, row, rank);
    if (weight == 0) {  // in all blocks of the cluster
        if (c.grad) put_zeros(share);
        if (rank == 0 && threadIdx.x == 0) c.effectiveness[row] = c.faithfulness[row] = 0;
        if (rank == 0 && threadIdx.x < 3 && c.answer_grad) c.answer_grad[3 * row + threadIdx.x] = 0;
        return;
    }

    Sums sums = no_sums();
    for (int step = 0; step < AHEAD; step++) share.stage(step, step * STEP<T>);
    // Read while the first copies are under way.
    int64_t answers[2] = {-1, -1};
    float w_at[2] = {}, o_at[2] = {}, direction = 0, hinge_weight = 1, gradient_weight = weight;
    bool valid = true;
    if (c.correct) {
        answers[0] = c.correct[row], answers[1] = c.wrong[row], direction = c.direction[row];
        valid = answers[0] >= 0 && answers[0] < c.vocab && answers[1] >= 0 && answers[1] < c.vocab;
        if (!valid) answers[0] = answers[1] = -1;
        if (c.gradient_weight) hinge_weight = c.gradient_weight[2 * row], gradient_weight = c.gradient_weight[2 * row + 1];
        if (valid)
#pragma unroll
            for (int i = 0; i < 2; i++) w_at[i] = widen(share.w[answers[i]]), o_at[i] = widen(share.o[answers[i]]);
    }
    const bool exclude = c.exclude_answers && c.correct;
    find_answers(share, answers, exclude);
    const int ring = call.plan.kept ? int(MOST_COLUMNS) : (AHEAD + 1) * STEP<T>;  // slots until the first one again
    for (int step = 0, read = 0, write = AHEAD * STEP<T>; step < share.steps; step++) {
        share.stage(step + AHEAD, write);
        copy_async_wait<AHEAD>();
        scan_step<T, CAPPED>(share, step, read, scale, cap, sums);
        read = read + STEP<T> == ring ? 0 : read + STEP<T>;
        write = write + STEP<T> == ring ? 0 : write + STEP<T>;
    }
    sums = over_block<WARPS>(sums, scale, scratch + WARPS_AT);
    if (blocks > 1) sums = over_cluster(sums, blocks, scale, scratch + MINE_AT, scratch + ALL_AT);

    const float poison = valid ? 0.0f : not_a_number();  // an id out of range: the row is NaN
    const float ratio = LN2 * log2f(sums.sum_o / sums.sum_w);
    float divergence = c.inverse_temperature * (sums.a / sums.sum_w * GROWTH) + ratio;
    if (divergence < 0) divergence = 0;  // rounding
    Softmaxes s = {finite(sums.top_w),
                   log2f(sums.sum_w),
                   finite(sums.top_o),
                   log2f(sums.sum_o),
                   divergence,
                   scale,
                   c.inverse_temperature * gradient_weight};
    if (call.nothing_left) s.divergence = 0, s.log_w = s.log_o = infinity();
    s.divergence += poison, s.log_w += poison, s.log_o += poison;

    const float difference = c.reverse ? w_at[0] - w_at[1] : o_at[0] - o_at[1];
    const float missing = c.margin - direction * difference + poison;
    const float hinge = (missing > 0 && answers[0] != answers[1] ? -direction * hinge_weight : 0.0f) + poison;
    if (rank == 0 && threadIdx.x == 0) {
        c.effectiveness[row] = !c.correct || missing <= 0 ? 0.0f : missing;  // NaN stays
        c.faithfulness[row] = weight * s.divergence;
        if (c.answer_grad) {
            float* out = c.answer_grad + 3 * row;
#pragma unroll
            for (int i = 0; i < 2; i++)
                out[i] = !c.correct  ? 0.0f
                         : exclude   ? poison
                         : c.reverse ? kl_gradient<true>(w_at[i], o_at[i], s)
                                     : kl_gradient<false>(w_at[i], o_at[i], s);
            out[2] = c.correct ? hinge : 0.0f;
        }
    }
    if (c.grad && c.reverse) gradient<T, CAPPED, true>(share, call.plan.kept, hinge, cap, s);
    if (c.grad && !c.reverse) gradient<T, CAPPED, false>(share, call.plan.kept, hinge, cap, s);
    if (blocks > 1) cluster_wait();
}

template <class T> Error launch_loss(Call call, Limits limits, T) {
    const InterventionLoss& c = call.loss;
    const auto kernel = c.softcap > 0 ? intervention_loss_kernel<T, true> : intervention_loss_kernel<T, false>;
    limits.max_cluster = widest_cluster(kernel, THREADS, limits);
    call.plan = plan_loss(c.rows, c.vocab, sizeof(T), limits);
    const int64_t clusters = c.rows + (c.l1 != nullptr);
    return launch(kernel, Shape{clusters * call.plan.cluster, THREADS, call.plan.cluster, call.plan.shared}, c.stream,
                  call);
}

}  // namespace

// The smallest cluster whose blocks are so small that RESIDENT of them share a multiprocessor (one copies while the
// other computes); else the smallest that holds the row at all; else one that reads it twice. Rows that would leave
// multiprocessors idle are cut into more blocks, as long as each has a step of work. By reasoning; not measured.
LossPlan plan_loss(int64_t rows, int64_t vocab, int64_t element_bytes, const Limits& limits) {
    const int64_t width = 16 / element_bytes, step = THREADS * PER_THREAD / width;
    const int64_t vectors = ceil_div(vocab + width - 1, width);
    auto bytes = [&](int64_t cluster) { return SCRATCH + 2 * 16 * ceil_div(vectors, cluster); };
    const int64_t roomy = limits.shared_per_processor / RESIDENT - limits.shared_reserved;
    const int64_t portable = least(PORTABLE_CLUSTER, limits.max_cluster);
    LossPlan plan = {1, 0, true, 0};
    while (plan.cluster < portable && bytes(plan.cluster) > roomy) plan.cluster *= 2;
    if (bytes(plan.cluster) > roomy)
        for (plan.cluster = 1; plan.cluster < limits.max_cluster && bytes(plan.cluster) > limits.shared_per_block;)
            plan.cluster *= 2;
    plan.kept = bytes(plan.cluster) <= limits.shared_per_block;
    if (!plan.kept) plan.cluster = 1;
    while (plan.cluster < portable && rows * plan.cluster < RESIDENT * limits.multiprocessors &&
           vectors > step * plan.cluster)
        plan.cluster *= 2;
    plan.capacity = plan.kept ? ceil_div(vectors, plan.cluster) : (AHEAD + 1) * step;
    plan.shared = SCRATCH + 2 * 16 * plan.capacity;
    return plan;
}

Error intervention_loss(const InterventionLoss& loss) {
    if (!loss.rows && !loss.l1) return nullptr;
    if (loss.vocab > MOST_COLUMNS) return TOO_MANY_COLUMNS;
    Limits limits;
    if (Error error = device_limits(&limits)) return error;
    const bool nothing_left = loss.vocab == 0 || (loss.exclude_answers && loss.correct && loss.vocab <= 2);
    const Call call = {loss, {}, nothing_left};
    return with_type(loss.type, [&](auto zero) { return launch_loss(call, limits, zero); });
}

}  // namespace cuda
}  // namespace actscale
