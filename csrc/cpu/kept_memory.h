// Memory for one large output, kept for the next when nobody holds it any more.
//
// A large tensor fresh from the system costs a page fault and a zeroed page on every first touch: for the gradient of
// 64 x 49152 floats as long as the kernel itself. A step writes such a gradient, uses it and drops it, and the next one
// wants the same size; so one freed block waits here instead of going back. A block belongs to one owner at a time.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>

namespace actscale {

void advise_huge_pages(void* memory, int64_t bytes);

class KeptMemory {
  public:
    explicit KeptMemory(int64_t bytes) : bytes_(bytes) {
        {
            std::lock_guard<std::mutex> lock(spare().mutex);
            if (spare().bytes >= bytes && spare().bytes / 2 <= bytes) {
                memory_ = spare().memory, bytes_ = spare().bytes;
                spare().memory = nullptr, spare().bytes = 0;
                return;
            }
        }
        if (posix_memalign(&memory_, 64, size_t(bytes))) throw std::bad_alloc();
        advise_huge_pages(memory_, bytes);
    }

    ~KeptMemory() {
        void* released = memory_;
        {
            std::lock_guard<std::mutex> lock(spare().mutex);
            released = spare().memory;
            spare().memory = memory_, spare().bytes = bytes_;
        }
        std::free(released);
    }

    KeptMemory(const KeptMemory&) = delete;
    KeptMemory& operator=(const KeptMemory&) = delete;

    void* memory() const { return memory_; }
    int64_t bytes() const { return bytes_; }

  private:
    struct Spare {
        std::mutex mutex;
        void* memory = nullptr;
        int64_t bytes = 0;
    };
    // Never destroyed: tensors may outlive the module.
    static Spare& spare() {
        static Spare* one = new Spare;
        return *one;
    }

    void* memory_ = nullptr;
    int64_t bytes_;
};

}  // namespace actscale
