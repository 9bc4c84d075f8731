// What Python sees: functions over raw addresses, sizes and strides. Ids that would lead out of bounds are refused
// here, before anything is written; the kernels run without the interpreter's lock.
#include <pybind11/pybind11.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "kept_memory.h"
#include "kernels.h"

namespace py = pybind11;
using Address = uintptr_t;

namespace actscale {

float* scratch(int64_t count) {
    struct Free { void operator()(float* p) const { std::free(p); } };
    static thread_local std::unique_ptr<float, Free> memory;
    static thread_local int64_t held = 0;
    if (count > held) {
        memory.reset();
        held = 0;
        void* fresh = nullptr;
        if (posix_memalign(&fresh, 64, count * sizeof(float))) throw std::bad_alloc();
        memory.reset(static_cast<float*>(fresh));
        held = count;
    }
    return memory.get();
}

// A large output is often fresh from the system, and then its first touch costs a page fault every 4 KiB, more than the
// kernel itself (x of 34 MB: forward 11 ms, with huge pages 4 ms). Where the system leaves huge pages to the program's
// advice, this asks for them; it is a hint, and nothing else about the memory changes.
void advise_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t PAGE = 2 << 20;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + PAGE - 1) / PAGE * PAGE;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / PAGE * PAGE;
    if (memory && bytes >= int64_t(4 * PAGE) && begin < end)
        madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

namespace {

std::vector<const Kernels*> supported() {
    std::vector<const Kernels*> levels = {&portable_kernels()};
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (avx2) levels.push_back(&avx2_kernels());
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        levels.push_back(&avx512_kernels());
#endif
    return levels;
}

const Kernels* kernels = supported().back();

void set_level(const std::string& name) {
    std::string known;
    for (const Kernels* level : supported()) {
        if (level->level == name) {
            kernels = level;
            return;
        }
        known += (known.empty() ? "" : ", ") + std::string(level->level);
    }
    throw py::value_error("ACTSCALE_CPU_LEVEL: got '" + name + "', expected one that this processor has: " + known);
}

template <class T> T* pointer(Address address) { return reinterpret_cast<T*>(address); }

template <size_t N> void copy(const py::tuple& from, int64_t (&to)[N]) {
    for (size_t i = 0; i < N; i++) to[i] = from[i].cast<int64_t>();
}

void check_ids(const char* name, const int64_t* ids, int64_t count, int64_t bound, const char* what) {
    for (int64_t row = 0; row < count; row++)
        if (ids[row] < 0 || ids[row] >= bound)
            throw py::value_error(std::string(name) + ": row " + std::to_string(row) + " has " + what + " " +
                                  std::to_string(ids[row]) + ", expected 0 to " + std::to_string(bound - 1));
}

void check_answers(const InterventionLoss& c) {
    check_ids("correct", c.correct, c.rows, c.vocab, "token id");
    check_ids("wrong", c.wrong, c.rows, c.vocab, "token id");
    for (int64_t row = 0; row < c.rows; row++) {
        if (c.correct[row] == c.wrong[row])
            throw py::value_error("wrong: row " + std::to_string(row) + " has token id " +
                                  std::to_string(c.wrong[row]) + ", the same as correct");
        if (c.direction[row] != 1 && c.direction[row] != -1)
            throw py::value_error("direction: row " + std::to_string(row) + " is " + std::to_string(c.direction[row]) +
                                  ", expected 1 or -1");
    }
}

ScaleHeads scale_heads_call(int type, const py::tuple& sizes, Address x, const py::tuple& x_stride, Address out,
                            const py::tuple& out_stride, Address alpha, Address shift, const py::tuple& groups,
                            float strength, Address row_strength, Address group, int threads) {
    ScaleHeads c = {};
    int64_t values[4];
    copy(sizes, values);
    c.type = Type(type);
    c.rows = values[0], c.positions = values[1], c.heads = values[2], c.width = values[3];
    c.x = pointer<void>(x), c.out = pointer<void>(out);
    copy(x_stride, c.x_stride);
    if (out) copy(out_stride, c.out_stride);
    c.alpha = pointer<float>(alpha), c.shift = pointer<float>(shift);
    c.groups = groups[0].cast<int64_t>();
    c.alpha_positions = groups[1].cast<int64_t>(), c.shift_positions = groups[2].cast<int64_t>();
    c.strength = strength, c.row_strength = pointer<float>(row_strength), c.group = pointer<int64_t>(group);
    c.threads = threads;
    if (c.group) check_ids("group", c.group, c.rows, c.groups, "group");
    return c;
}

int64_t size_of(Type type) { return type == Type::float32 ? 4 : 2; }

// `run` without the interpreter's lock.
template <class Call> void unlocked(void (*run)(const Call&), const Call& call) {
    py::gil_scoped_release release;
    run(call);
}

}  // namespace
}  // namespace actscale

PYBIND11_MODULE(_C, module) {
    using namespace actscale;
    module.doc() = "C++ kernels of actscale_fast; called by actscale_fast.ops.cpu, which says what the arguments are.";

    module.def("levels", [] {
        py::list names;
        for (const Kernels* level : supported()) names.append(level->level);
        return names;
    });
    module.def("level", [] { return kernels->level; });
    module.def("set_level", &set_level);

    module.def("scale_heads", [](int type, py::tuple sizes, Address x, py::tuple x_stride, Address out,
                                 py::tuple out_stride, Address alpha, Address shift, py::tuple groups, float strength,
                                 Address row_strength, Address group, int threads) {
        const ScaleHeads c = scale_heads_call(type, sizes, x, x_stride, out, out_stride, alpha, shift, groups, strength,
                                              row_strength, group, threads);
        advise_huge_pages(c.out, c.rows * c.positions * c.heads * c.width * size_of(c.type));
        unlocked(kernels->scale_heads, c);
    });

    module.def("scale_heads_backward", [](int type, py::tuple sizes, Address dy, py::tuple dy_stride, Address x,
                                          py::tuple x_stride, Address dx, py::tuple dx_stride, Address alpha,
                                          Address shift, py::tuple groups, float strength, Address row_strength,
                                          Address group, Address dalpha, Address dshift, int threads) {
        ScaleHeads c = scale_heads_call(type, sizes, x, x_stride, dx, dx_stride, alpha, shift, groups, strength,
                                        row_strength, group, threads);
        c.dy = pointer<void>(dy);
        copy(dy_stride, c.dy_stride);
        c.dalpha = pointer<float>(dalpha), c.dshift = pointer<float>(dshift);
        advise_huge_pages(c.out, c.rows * c.positions * c.heads * c.width * size_of(c.type));
        unlocked(kernels->scale_heads_backward, c);
    });

    module.def("intervention_loss", [](int type, int64_t rows, int64_t vocab, Address logits, int64_t logits_stride,
                                       Address reference, int64_t reference_stride, Address correct, Address wrong,
                                       Address direction, float margin, float inverse_temperature, bool exclude_answers,
                                       bool reverse, Address effectiveness, Address faithfulness, Address grad,
                                       Address answer_grad, int threads) {
        InterventionLoss c = {};
        c.type = Type(type), c.rows = rows, c.vocab = vocab;
        c.logits = pointer<void>(logits), c.reference = pointer<void>(reference);
        c.logits_stride = logits_stride, c.reference_stride = reference_stride;
        c.correct = pointer<int64_t>(correct), c.wrong = pointer<int64_t>(wrong);
        c.direction = pointer<float>(direction);
        c.margin = margin, c.inverse_temperature = inverse_temperature;
        c.exclude_answers = exclude_answers, c.reverse = reverse;
        c.effectiveness = pointer<float>(effectiveness), c.faithfulness = pointer<float>(faithfulness);
        c.grad = pointer<void>(grad), c.answer_grad = pointer<float>(answer_grad), c.threads = threads;
        if (c.correct) check_answers(c);
        unlocked(kernels->intervention_loss, c);
    });

    module.def("scale_gradient", [](int type, int64_t rows, int64_t vocab, Address grad, Address d_effectiveness,
                                    int64_t d_effectiveness_stride, Address d_faithfulness,
                                    int64_t d_faithfulness_stride, Address correct, Address wrong, Address answer_grad,
                                    int threads) {
        ScaleGradient c = {};
        c.type = Type(type), c.rows = rows, c.vocab = vocab, c.grad = pointer<void>(grad);
        c.d_effectiveness = pointer<float>(d_effectiveness), c.d_effectiveness_stride = d_effectiveness_stride;
        c.d_faithfulness = pointer<float>(d_faithfulness), c.d_faithfulness_stride = d_faithfulness_stride;
        c.correct = pointer<int64_t>(correct), c.wrong = pointer<int64_t>(wrong);
        c.answer_grad = pointer<float>(answer_grad), c.threads = threads;
        if (c.correct) check_ids("correct", c.correct, rows, vocab, "token id");
        if (c.wrong) check_ids("wrong", c.wrong, rows, vocab, "token id");
        unlocked(kernels->scale_gradient, c);
    });

    py::class_<KeptMemory>(module, "KeptMemory", py::buffer_protocol())
        .def(py::init<int64_t>())
        .def_buffer([](KeptMemory& block) {
            return py::buffer_info(block.memory(), 1, py::format_descriptor<uint8_t>::format(), block.bytes());
        });

    module.def("l1_norm", [](Address values, Address sign, Address norm, int64_t count) {
        py::gil_scoped_release release;
        kernels->l1_norm(pointer<float>(values), pointer<float>(sign), pointer<float>(norm), count);
    });

    module.def("proximal_adam", [](int64_t count, Address parameter, Address gradient, Address exp_avg,
                                   Address exp_avg_sq, Address step, double lr, double beta1, double beta2, double eps,
                                   double l1) {
        ProximalAdam c = {count, pointer<float>(parameter), pointer<float>(exp_avg), pointer<float>(exp_avg_sq),
                          pointer<float>(step), pointer<float>(gradient), lr, beta1, beta2, eps, l1};
        unlocked(kernels->proximal_adam, c);
    });

    module.def("exponential", [](Address in, Address out, int64_t count) {
        kernels->exponential(pointer<float>(in), pointer<float>(out), count);
    });
}
