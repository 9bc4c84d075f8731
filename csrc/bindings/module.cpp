// The module: which level of the kernels is in use, and the memory that they share.
#include "bindings.h"
#include "build_record.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <new>
#include <utility>
#include <vector>

namespace actscale {

namespace {

struct Scratch {
    float* memory = nullptr;
    int64_t held = 0;
    ~Scratch() { std::free(memory); }
};
thread_local Scratch own;

}  // namespace

float* scratch(int64_t count) {
    if (count > own.held) {
        release_scratch(0);
        void* fresh = nullptr;
        if (posix_memalign(&fresh, 64, size_t(count) * sizeof(float))) throw std::bad_alloc();
        own.memory = static_cast<float*>(fresh);
        own.held = count;
    }
    return own.memory;
}

void release_scratch(int64_t kept) {
    if (own.held <= kept) return;
    std::free(own.memory);
    own.memory = nullptr, own.held = 0;
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

// Linux gives AMX's registers to processes that ask for them. From then on it refuses stacks for signals that have no
// room for these registers (12 KiB), so nothing is asked for before the level is used.
bool may_use_tiles() {
#if defined(__x86_64__) && defined(__linux__)
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM
    static const bool granted = !syscall(SYS_arch_prctl, REQUEST, TILE_DATA);
    return granted;
#else
    return false;
#endif
}

// Levels that have to be found right and faster on this machine before they are used unasked: on some processors their
// instructions are slower than those that they replace.
std::vector<const Kernels*> found_for_verdict() {
    std::vector<const Kernels*> levels;
#if defined(__x86_64__)
    // By CPUID: compilers differ in the names that they know. avx512_kernels() is itself AVX-512.
    [[maybe_unused]] unsigned a = 0, b = 0, c = 0, d = 0;
    if (supported().back()->level != std::string("avx512")) return levels;
#if ACTSCALE_AVX512_BF16
    if (__get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1)) levels.push_back(&avx512_bf16_kernels());
#endif
#if ACTSCALE_AVX512_AMX && defined(__linux__)
    constexpr long SUPPORTED = 0x1021;  // ARCH_GET_XCOMP_SUPP
    uint64_t features = 0;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1) &&
        !syscall(SYS_arch_prctl, SUPPORTED, &features) && (features >> 18 & 1))
        levels.push_back(&avx512_amx_kernels());
#endif
#endif
    return levels;
}

const std::vector<const Kernels*>& waiting_for_verdict() {
    static const std::vector<const Kernels*> levels = found_for_verdict();
    return levels;
}

// The one of them that a verdict may choose, or null. AMX replaces AVX512_BF16, which is slower where there is AMX (43
// against 12 ms; 64 x 576, V = 49152 in bfloat16 on Sapphire Rapids).
const Kernels* candidate() { return waiting_for_verdict().empty() ? nullptr : waiting_for_verdict().back(); }

bool may_use(const Kernels& level) { return level.level != std::string("avx512_amx") || may_use_tiles(); }

std::vector<const Kernels*> all_levels() {
    std::vector<const Kernels*> levels = supported();
    for (const Kernels* level : waiting_for_verdict()) levels.push_back(level);
    return levels;
}

const Kernels* in_use = supported().back();

void set_level(const std::string& name) {
    std::string known;
    for (const Kernels* level : all_levels()) {
        if (level->level == name && may_use(*level)) {
            in_use = level;
            return;
        }
        known += (known.empty() ? "" : ", ") + std::string(level->level);
    }
    throw py::value_error("ACTSCALE_CPU_LEVEL: got '" + name + "', expected one that this processor has: " + known);
}

}  // namespace

const Kernels& kernels() { return *in_use; }

const Kernels& kernels_by_verdict() {
    static const Kernels* const chosen = candidate() && may_use(*candidate()) ? candidate() : nullptr;
    return chosen ? *chosen : *in_use;
}

}  // namespace actscale

PYBIND11_MODULE(_C, module) {
    using namespace actscale;
    namespace py = pybind11;
    module.doc() = "C++ kernels of actscale_fast; called by actscale_fast.ops.cpu, which says what the arguments are.";

    module.def("levels", [] {
        py::list names;
        for (const Kernels* level : all_levels()) names.append(level->level);
        return names;
    });
    module.def("levels_by_verdict", [] {
        py::list names;
        if (const Kernels* level = candidate()) names.append(level->level);
        return names;
    });
    module.def("level", [] { return kernels().level; });
    module.def("set_level", &set_level);

    // How this extension was built; written by setup.py.
    module.def("build_record", [] {
        py::dict record, dropped, dropped_levels;
        const std::vector<std::pair<const char*, const char*>> archs = {ACTSCALE_DROPPED};
        for (const auto& [arch, reason] : archs) dropped[arch] = reason;
        const std::vector<std::pair<const char*, const char*>> levels = {ACTSCALE_DROPPED_LEVELS};
        for (const auto& [level, reason] : levels) dropped_levels[level] = reason;
        py::list built;
        built.append("portable");
#if defined(__x86_64__)
        built.append("avx2"), built.append("avx512");
        if (ACTSCALE_AVX512_BF16) built.append("avx512_bf16");
#if defined(__linux__)
        if (ACTSCALE_AVX512_AMX) built.append("avx512_amx");
#endif
#endif
        record["simd_levels"] = py::tuple(built);
        record["dropped_levels"] = dropped_levels;
        record["compiler"] = ACTSCALE_COMPILER, record["openmp"] = bool(ACTSCALE_OPENMP);
        record["nvcc"] = ACTSCALE_NVCC, record["no_cuda"] = ACTSCALE_NO_CUDA, record["dropped_archs"] = dropped;
        record["sources"] = ACTSCALE_SOURCES;
        return record;
    });

    bind_scale_heads(module);
    bind_dynamic_scale(module);
    bind_scale_channels(module);
    bind_intervention_loss(module);
    bind_linear_softmax(module);
    bind_proximal_adam(module);
#ifdef ACTSCALE_CUDA
    bind_cuda(module);
#endif
}
