// Memory of the two stages on a CPU, in huge pages where the system has them: what is read again and again then takes a few
// entries of the address translation's cache, not tens of thousands. A stage begins with hardly anything in it, gets the
// lowest place that is free, and gives it back to whoever asks next: the peak is what lives at once, not what happens to
// lie between other things. Pages stay until they are released, since systems may take far longer to find some than to
// fill them.
#pragma once
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <map>
#include <mutex>
#include <new>

namespace esrl {

class Pool {
    static constexpr size_t HUGE_PAGE = 2 << 20, ALIGNMENT = 64;
    static constexpr size_t LEAST = 1 << 15;  // bytes; what is smaller is malloc's

    std::mutex lock;
    char *begin = nullptr, *end = nullptr;
    char* reached = nullptr;              // nothing above has been used since pages were released
    std::map<char*, size_t> free_places;  // bytes; none next to another

    static char* up(char* at) { return down(at + HUGE_PAGE - 1); }
    static char* down(char* at) { return at - reinterpret_cast<uintptr_t>(at) % HUGE_PAGE; }

    // Addresses, as many as there is memory; a system that refuses leaves everything to malloc.
    Pool() {
        const size_t bytes = size_t(sysconf(_SC_PHYS_PAGES)) * size_t(sysconf(_SC_PAGE_SIZE)) / HUGE_PAGE * HUGE_PAGE;
        const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        void* mapped = mmap(nullptr, bytes + HUGE_PAGE, PROT_READ | PROT_WRITE, flags, -1, 0);
        if (mapped == MAP_FAILED) return;
        begin = reached = up(static_cast<char*>(mapped));
        end = begin + bytes;
#ifdef MADV_HUGEPAGE
        madvise(begin, bytes, MADV_HUGEPAGE);  // a system without them refuses: no harm
#endif
        free_places[begin] = bytes;
        // a child process that is made while another thread is in here can go on
        pthread_atfork([] { the().lock.lock(); }, [] { the().lock.unlock(); }, [] { the().lock.unlock(); });
    }

   public:
    // How many stages this thread is in: only they get memory from here.
    static inline thread_local int64_t stages = 0;

    static Pool& the() {
        static Pool& pool = *new Pool;  // never deleted: some memory is given back when the process ends
        return pool;
    }

    // Null: not for this one, or there is none left.
    void* take(size_t bytes) noexcept try {
        if (!stages || bytes < LEAST || bytes > size_t(end - begin)) return nullptr;
        bytes = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT + ALIGNMENT;  // its size comes before it
        const std::lock_guard<std::mutex> guard(lock);
        for (auto place = free_places.begin(); place != free_places.end(); ++place) {
            const auto [at, there] = *place;
            if (there < bytes) continue;
            if (there > bytes) free_places.emplace_hint(place, at + bytes, there - bytes);
            free_places.erase(place);
            reached = std::max(reached, at + bytes);
            *reinterpret_cast<size_t*>(at) = bytes;
            return at + ALIGNMENT;
        }
        return nullptr;
    } catch (const std::bad_alloc&) {
        return nullptr;
    }

    // False: it is not from here.
    bool give(void* memory) noexcept {
        if (memory < begin || memory >= end) return false;
        char* at = static_cast<char*>(memory) - ALIGNMENT;
        size_t bytes = *reinterpret_cast<size_t*>(at);
        const std::lock_guard<std::mutex> guard(lock);
        auto next = free_places.lower_bound(at);
        if (next != free_places.end() && next->first == at + bytes) {
            bytes += next->second;
            next = free_places.erase(next);
        }
        if (next != free_places.begin()) {
            auto& [before, size] = *std::prev(next);
            if (before + size == at) {
                size += bytes;
                return true;
            }
        }
        try {
            free_places.emplace_hint(next, at, bytes);
        } catch (const std::bad_alloc&) {
            // lost: nobody gets it any more
        }
        return true;
    }

    // Whole pages that are free go back to the system.
    void release() noexcept {
        const std::lock_guard<std::mutex> guard(lock);
        for (const auto& [at, bytes] : free_places) {
            char *first = up(at), *last = std::min(down(at + bytes), up(reached));
            if (first < last) madvise(first, last - first, MADV_DONTNEED);
            if (at + bytes == end) reached = std::min(reached, at);
        }
    }
};

// Memory from the pool within a stage, else from malloc. Null: there is none.
static inline void* take(size_t bytes) {
    void* taken = Pool::the().take(bytes);
    return taken ? taken : std::malloc(bytes);
}

static inline void give(void* memory) {
    if (!Pool::the().give(memory)) std::free(memory);
}

}  // namespace esrl
