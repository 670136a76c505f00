// Rows of numbers, what a thread of a team does with them, and activations.
#pragma once
#include <omp.h>

#include <algorithm>

#include "vectors.h"

namespace esrl {

constexpr int WIDE = 2;          // vectors of a block
constexpr int BLOCK = WIDE * W;  // outputs of a block
constexpr int LINE = 16;         // numbers of a cache line

// Rows of a matrix, `stride` numbers apart.
struct Rows {
    float* at;
    int64_t stride;
    float* row(int64_t i) const { return at + i * stride; }
};

// Lines of numbers that are wanted soon. Always inlined: GCC drops calls of a function that does nothing but prefetch.
__attribute__((always_inline)) static inline void fetch(const float* numbers, int64_t count) {
    for (int64_t i = 0; i < count; i += LINE) __builtin_prefetch(numbers + i, 0, 2);
}

// What one thread of a team does of something that is done in equal parts.
struct Team {
    int64_t index = omp_get_thread_num(), size = omp_get_num_threads();
    int64_t begin(int64_t n) const { return n * index / size; }
    int64_t end(int64_t n) const { return n * (index + 1) / size; }
};

enum Activation : int64_t { NONE = 0, RELU = 1, SILU = 2 };

static inline vec activate(vec x, int64_t activation) {
    if (activation == RELU) return x < 0 ? vec{} : x;  // what is not a number stays so
    if (activation == SILU) {
        const vec small = exp_negative(x < 0 ? x : -x);
        return x * (x < 0 ? small : all(1)) / (1 + small);
    }
    return x;
}

}  // namespace esrl
