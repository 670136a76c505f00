// PyTorch's tensors on a CPU come from the pool (pool.h) within a stage, and from where they always do outside of one.
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>

namespace {

void* (*take)(size_t);
bool (*give)(void*);

void free_bytes(void* memory) {
    if (!memory) return;
    c10::profiledCPUMemoryReporter().Delete(memory);
    if (!give(memory)) c10::free_cpu(memory);
}

struct Allocator final : c10::Allocator {
    c10::DataPtr allocate(size_t bytes) override {
        void* memory = take(bytes);
        if (!memory) memory = c10::alloc_cpu(bytes);
        if (memory) c10::profiledCPUMemoryReporter().New(memory, bytes);
        return {memory, memory, &free_bytes, c10::Device(c10::DeviceType::CPU)};
    }
    c10::DeleterFnPtr raw_deleter() const override { return &free_bytes; }
    void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

}  // namespace

// take_bytes: null where it has nothing; give_bytes: whether memory was from it. 0: another allocator is in the way.
extern "C" int64_t esrl_serve(void* (*take_bytes)(size_t), bool (*give_bytes)(void*)) {
    if (c10::GetCPUAllocator() != c10::GetDefaultCPUAllocator()) return 0;
    take = take_bytes;
    give = give_bytes;
    c10::SetCPUAllocator(new Allocator);  // never deleted: tensors may outlive whatever ends with the process
    return 1;
}
