// Memory in huge pages where the system has them: what is read at every step then takes a few entries of the address
// translation's cache, not tens of thousands. What is done with is kept for whoever asks next, until it is released:
// systems may take far longer to find pages than to fill them.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

namespace esrl {

constexpr size_t HUGE_PAGE = 2 << 20;

// Where the numbers begin, and the memory around them.
struct Region {
    float* at = nullptr;
    void* mapped = nullptr;
    size_t bytes = 0;
};

class Kept {
    std::mutex lock;
    std::vector<Region> regions;

   public:
    // The smallest region that is there for so much, and not for more than twice as much. Without one, those that are too
    // small by less than half go back: batches that grow would otherwise leave all their predecessors' memory behind.
    Region take(size_t bytes) {
        const std::lock_guard<std::mutex> guard(lock);
        Region* best = nullptr;
        for (Region& region : regions)
            if (region.bytes >= bytes && region.bytes / 2 <= bytes && (!best || region.bytes < best->bytes)) best = &region;
        if (best) {
            const Region taken = *best;
            *best = regions.back();
            regions.pop_back();
            return taken;
        }
        for (size_t i = regions.size(); i-- > 0;)
            if (regions[i].bytes < bytes && regions[i].bytes > bytes / 2) {
                munmap(regions[i].mapped, regions[i].bytes);
                regions[i] = regions.back();
                regions.pop_back();
            }
        return {};
    }
    void give(Region region) noexcept {
        const std::lock_guard<std::mutex> guard(lock);
        try {
            regions.push_back(region);
        } catch (const std::bad_alloc&) {
            munmap(region.mapped, region.bytes);
        }
    }
    bool release() noexcept {
        const std::lock_guard<std::mutex> guard(lock);
        const bool any = !regions.empty();
        for (const Region& region : regions) munmap(region.mapped, region.bytes);
        regions.clear();
        return any;
    }
};

inline Kept& kept() {
    static Kept& all = *new Kept;  // never deleted: some memory is given back when the process ends
    return all;
}

// Room for `count` numbers, whatever they are.
class Large {
    Region region;

   public:
    explicit Large(int64_t count) {
        const size_t bytes = (count * sizeof(float) / HUGE_PAGE + 2) * HUGE_PAGE;  // one more, to begin at a whole one
        region = kept().take(bytes);
        if (region.mapped) return;
        void* mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (mapped == MAP_FAILED) throw std::bad_alloc();
        const uintptr_t begin = (reinterpret_cast<uintptr_t>(mapped) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
        region = {reinterpret_cast<float*>(begin), mapped, bytes};
#ifdef MADV_HUGEPAGE
        madvise(region.at, bytes - HUGE_PAGE, MADV_HUGEPAGE);  // a system without them refuses: no harm
#endif
    }
    Large(Large&& other) noexcept : region(std::exchange(other.region, {})) {}
    Large& operator=(Large&& other) noexcept {
        std::swap(region, other.region);
        return *this;
    }
    ~Large() {
        if (region.mapped) kept().give(region);
    }
    float* data() const { return region.at; }
};

}  // namespace esrl
