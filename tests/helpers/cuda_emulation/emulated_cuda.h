// A CUDA device on the CPU, for the kernels of csrc/cuda_*: what they use of the hardware, and no more.
//
// A thread is a fiber; the blocks of one cluster run together, one cluster after the other. To show mistakes rather
// than to be fast: shared memory starts as NaN, an asynchronous copy happens only when it is waited for, the order in
// which threads run can be reversed, and a barrier that not all threads reach, a shuffle of lanes that are gone, a
// misaligned copy or a launch beyond the device's limits is an error.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define ACTSCALE_LEVEL emulation
#include "cpu/simd.h"

#define __global__
#define __launch_bounds__(...)

struct Dimensions { unsigned x, y; };
inline Dimensions threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

// A launch as another device would run it: the kernel by its address, and its parameter as it lies in memory.
struct Launch { const void* kernel; int64_t blocks, blocks_y; int threads, cluster; int64_t shared; std::string call; };

struct Device {
    actscale::cuda::Limits limits = {4, 232448, 233472, 1024, 16};
    int cluster_room = 16;  // blocks of a cluster that fit, whatever the device says that it supports
    int count = 1, capability = 90, driver = 13000;
    bool reversed = false;  // the order in which the threads run
    long launches = 0;
    void (*observer)(void* stream) = nullptr;  // called before each launch
    std::function<void(const Launch&)> instead;  // runs the launches in place of the fibers
};
inline Device device;
inline std::mutex one_launch;  // at a time: launches run without the interpreter's lock

constexpr size_t STACK = 128 << 10;
constexpr int LANES = 32;

struct Copy { void* to; const void* from; };

inline long progress = 0;  // barriers passed and threads ended

struct Barrier {
    int expected = 0, arrived = 0;
    long generation = 0;
    void release_if_complete() { if (arrived && arrived == expected) arrived = 0, generation++, progress++; }
    long arrive() { const long mine = generation; arrived++, release_if_complete(); return mine; }
    void leave() { expected--, progress++, release_if_complete(); }
};

struct Warp { Barrier barrier; int lanes = 0; float values[2][LANES]; };
struct Block { Barrier barrier; std::vector<Warp> warps; std::unique_ptr<char[]> shared; };
struct Thread {
    ucontext_t context;
    void* stack;
    int block, index, shuffles = 0;
    bool done = false, in_cluster_barrier = false;
    long cluster_generation = 0;
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> groups;
};

struct Cluster {
    Barrier barrier;
    std::vector<Block> blocks;
    std::vector<Thread> threads;
    ucontext_t scheduler;
    Thread* current = nullptr;
    void (*kernel)(const void*) = nullptr;
    const void* call = nullptr;
    unsigned first_block = 0;
    int64_t shared = 0;
    std::string error;
};
inline Cluster* running = nullptr;
inline Thread& self() { return *running->current; }
inline Block& block() { return running->blocks[self().block]; }
inline Warp& warp() { return block().warps[self().index / LANES]; }

inline void switch_to(ucontext_t* from, ucontext_t* to, const void* stack, size_t size, bool for_good = false) {
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake, stack, size);
    swapcontext(from, to);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
    (void)stack, (void)size, (void)for_good;
    swapcontext(from, to);
#endif
}

inline const void* scheduler_stack = nullptr;  // known to the sanitizer alone
inline size_t scheduler_stack_size = 0;
inline void yield(bool for_good = false) {
    switch_to(&self().context, &running->scheduler, scheduler_stack, scheduler_stack_size, for_good);
}
[[noreturn]] inline void fail(const char* what) {
    running->error = what;
    for (;;) yield();
}
inline void wait(const Barrier& barrier, long generation) { while (barrier.generation == generation) yield(); }

inline void perform(size_t pending) {
    for (auto& groups = self().groups; groups.size() > pending; groups.pop_front())
        for (const Copy& copy : groups.front()) memcpy(copy.to, copy.from, 16);
}

inline void run_thread() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
    running->kernel(running->call);
    if (self().in_cluster_barrier) fail("a thread ended between arriving at the cluster's barrier and waiting for it");
    self().done = true;
    warp().barrier.leave(), block().barrier.leave(), running->barrier.leave();
    for (;;) yield(true);
}

// One stack for each thread of the largest cluster so far.
inline void* stack_of(size_t thread) {
    static std::vector<void*> stacks;
    while (stacks.size() <= thread) {
        void* fresh = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (fresh == MAP_FAILED) throw std::bad_alloc();
        stacks.push_back(fresh);
    }
    return stacks[thread];
}

inline void run(Cluster& cluster, int blocks, int threads) {
    running = &cluster;
    cluster.barrier.expected = blocks * threads;
    cluster.blocks.resize(blocks), cluster.threads.resize(size_t(blocks) * threads);
    for (Block& b : cluster.blocks) {
        b.barrier.expected = threads;
        b.warps.resize((threads + LANES - 1) / LANES);
        for (int i = 0; i < threads; i++) b.warps[i / LANES].lanes++, b.warps[i / LANES].barrier.expected++;
        b.shared.reset(new char[cluster.shared]);  // of its exact size: a sanitizer sees what lies beyond
        memset(b.shared.get(), 0xff, cluster.shared);
    }
    for (size_t i = 0; i < cluster.threads.size(); i++) {
        Thread& t = cluster.threads[i];
        t.block = int(i) / threads, t.index = int(i) % threads, t.stack = stack_of(i);
        getcontext(&t.context);
        t.context.uc_stack.ss_sp = t.stack, t.context.uc_stack.ss_size = STACK, t.context.uc_link = nullptr;
        makecontext(&t.context, run_thread, 0);
    }
    size_t left = cluster.threads.size();
    auto order = [](size_t i, size_t count) { return device.reversed ? count - 1 - i : i; };
    auto resume = [&](Thread& t) {
        if (t.done || !cluster.error.empty()) return;
        cluster.current = &t;
        threadIdx = {unsigned(t.index), 0}, blockIdx.x = cluster.first_block + t.block;
        switch_to(&cluster.scheduler, &t.context, t.stack, STACK);
        left -= t.done;
    };
    // As far apart as barriers allow: a warp runs until it is stuck, then the next one, and so do the blocks.
    auto settle = [&](auto body) {
        for (long before = progress - 1; progress != before && cluster.error.empty();) before = progress, body();
    };
    const size_t warps = cluster.blocks[0].warps.size();
    settle([&] {
        for (int b = 0; b < blocks; b++)
            settle([&] {
                for (size_t w = 0; w < warps; w++)
                    settle([&] {
                        const size_t lanes = cluster.blocks[0].warps[order(w, warps)].lanes;
                        for (size_t i = 0; i < lanes; i++)
                            resume(cluster.threads[order(b, blocks) * threads + order(w, warps) * LANES +
                                                   order(i, lanes)]);
                    });
            });
    });
    if (!cluster.error.empty()) throw std::runtime_error(cluster.error);
    if (left) throw std::runtime_error("some threads wait at a barrier that the others never reach");
}

}  // namespace emulated

inline void __syncthreads() {
    emulated::Barrier& barrier = emulated::block().barrier;
    emulated::wait(barrier, barrier.arrive());
}
inline float __shfl_xor_sync(unsigned, float value, int mask) {
    emulated::Warp& warp = emulated::warp();
    if (warp.barrier.expected != emulated::LANES) emulated::fail("a shuffle in a warp that is not whole");
    const int lane = emulated::self().index % emulated::LANES;
    float* values = warp.values[emulated::self().shuffles++ % 2];  // all have read one set before the next but one
    values[lane] = value;
    emulated::wait(warp.barrier, warp.barrier.arrive());
    return values[lane ^ mask];
}

namespace actscale {
namespace cuda {

inline float exp2_approximate(float x) {
    const float y = exp2f(x);
    return y < 1.17549435e-38f ? 0.0f : y;  // NaN stays
}
inline float reciprocal(float x) { return 1 / x; }
inline float rounded_product(float a, float b) {
    volatile float product = a * b;
    return product;
}
inline float half_value(uint16_t bits) { return emulation::widen(emulation::half{bits}); }
inline uint16_t half_bits(float value) { emulation::half out; emulation::narrow(value, &out); return out.bits; }
inline uint16_t bf16_bits(float value) { emulation::bf16 out; emulation::narrow(value, &out); return out.bits; }
inline uint32_t pair_bits(float low, float high, half16) { return half_bits(low) | uint32_t(half_bits(high)) << 16; }
inline uint32_t pair_bits(float low, float high, bf16) { return bf16_bits(low) | uint32_t(bf16_bits(high)) << 16; }

inline float value_of(half16 value) { return half_value(value.bits); }
inline float value_of(bf16 value) { return emulation::widen(emulation::bf16{value.bits}); }
template <class T> inline uint32_t pair_max(uint32_t a, uint32_t b, T) {
    auto larger = [](uint16_t p, uint16_t q) {
        const float x = value_of(T{p}), y = value_of(T{q});
        return y > x || x != x ? q : p;
    };
    return larger(uint16_t(a), uint16_t(b)) | uint32_t(larger(uint16_t(a >> 16), uint16_t(b >> 16))) << 16;
}

inline char* dynamic_shared() { return emulated::block().shared.get(); }

inline void copy_async(Vector* shared, const void* global) {
    if (uintptr_t(shared) % 16 || uintptr_t(global) % 16) emulated::fail("an asynchronous copy off the 16-byte grid");
    emulated::self().open.push_back({shared, global});
}
inline void copy_async_commit() {
    emulated::self().groups.push_back(std::move(emulated::self().open));
    emulated::self().open.clear();
}
template <int PENDING> inline void copy_async_wait() { emulated::perform(PENDING); }

inline void cluster_arrive() {
    emulated::self().cluster_generation = emulated::running->barrier.arrive();
    emulated::self().in_cluster_barrier = true;
}
inline void cluster_wait() {
    emulated::wait(emulated::running->barrier, emulated::self().cluster_generation);
    emulated::self().in_cluster_barrier = false;
}
template <class T> inline const T* in_block(const T* shared, int rank) {
    const auto offset = reinterpret_cast<const char*>(shared) - dynamic_shared();
    return reinterpret_cast<const T*>(emulated::running->blocks[rank].shared.get() + offset);
}

// What this build says that it was compiled for.
#define __CUDA_ARCH_LIST__ 800, 900, 1000
constexpr int TOOLKIT = 13000;

inline Error count_devices(int* count) { return *count = emulated::device.count, nullptr; }
inline Error current_device(int* device) { return *device = 0, nullptr; }
inline Error ask_model(int device, DeviceModel* out) {
    out->capability = emulated::device.capability, out->driver = emulated::device.driver;
    snprintf(out->name, sizeof(out->name), "emulated device %d", device);
    return nullptr;
}

template <class Call> int widest_cluster(void (*)(Call), int, const Limits& limits) {
    int cluster = limits.max_cluster;
    while (cluster > emulated::device.cluster_room) cluster /= 2;
    return cluster;
}

template <class Call, class Shape>
const char* launch(void (*kernel)(Call), const Shape& shape, void* stream, const Call& call) {
    const Limits& limits = emulated::device.limits;
    std::lock_guard<std::mutex> alone(emulated::one_launch);
    if (emulated::device.observer) emulated::device.observer(stream);
    if (shape.blocks < 1 || shape.blocks > 0x7fffffff || shape.blocks_y < 1 || shape.blocks_y > 65535 ||
        shape.threads < 1 || shape.threads > 1024 || shape.cluster > limits.max_cluster ||
        shape.blocks % shape.cluster || shape.shared > limits.shared_per_block)
        return "invalid argument";
    if (shape.cluster > emulated::device.cluster_room) return "cluster out of resources";
    static void (*body)(Call);
    body = kernel;
    emulated::device.launches++;
    if (emulated::device.instead) {
        const std::string bytes(reinterpret_cast<const char*>(&call), sizeof call);
        emulated::device.instead({reinterpret_cast<const void*>(kernel), shape.blocks, shape.blocks_y, shape.threads,
                                  shape.cluster, shape.shared, bytes});
        return nullptr;
    }
    gridDim = {unsigned(shape.blocks), unsigned(shape.blocks_y)}, blockDim = {unsigned(shape.threads), 1};
    for (unsigned y = 0; y < gridDim.y; y++)
        for (unsigned block = 0; block < gridDim.x; block += shape.cluster) {
            emulated::Cluster cluster;
            cluster.kernel = [](const void* argument) { body(*static_cast<const Call*>(argument)); };
            cluster.call = &call, cluster.first_block = block, cluster.shared = shape.shared;
            blockIdx.y = y;
            emulated::run(cluster, shape.cluster, shape.threads);
        }
    return nullptr;
}

}  // namespace cuda
}  // namespace actscale
