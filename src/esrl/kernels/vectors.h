// Vectors of the processor's width, by the compiler's own extension (GCC, Clang): no intrinsics, any architecture.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

namespace esrl {

#if defined(__AVX512F__)
constexpr int W = 16;  // floats in a vector
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vec __attribute__((vector_size(W * 4)));
typedef int32_t ints __attribute__((vector_size(W * 4)));
// the same in memory, at any address
typedef float vec_at __attribute__((vector_size(W * 4), aligned(4), may_alias));

static inline vec load(const float* at) { return *reinterpret_cast<const vec_at*>(at); }
static inline void store(float* at, vec value) { *reinterpret_cast<vec_at*>(at) = value; }
static inline vec all(float value) { return value - vec{}; }
static inline vec larger(vec a, vec b) { return a > b ? a : b; }

// The same vector, loaded once: compilers would rather read it from memory for each of its uses.
static inline vec in_register(vec a) {
#if defined(__AVX512F__)
    __asm__("" : "+v"(a));
#elif defined(__x86_64__)
    __asm__("" : "+x"(a));
#elif defined(__aarch64__)
    __asm__("" : "+w"(a));
#endif
    return a;
}

// Lanes of two vectors in groups of four: (a0 b0 a1 b1 ...) and (a2 b2 a3 b3 ...); then (a0 a1 b0 b1) and (a2 a3 b2 b3).
#if defined(__AVX512F__)
#define ESRL_LANES(f) f(0) f(4) f(8) f(12)
#elif defined(__AVX__)
#define ESRL_LANES(f) f(0) f(4)
#else
#define ESRL_LANES(f) f(0)
#endif
#define ESRL_MIX_LOW(i) , i, i + W, i + 1, i + 1 + W
#define ESRL_MIX_HIGH(i) , i + 2, i + 2 + W, i + 3, i + 3 + W
#define ESRL_PAIR_LOW(i) , i, i + 1, i + W, i + 1 + W
#define ESRL_PAIR_HIGH(i) , i + 2, i + 3, i + 2 + W, i + 3 + W

// The sums of four vectors' numbers, each in the same order.
static inline void four_totals(const vec* a, float* to) {
    vec half[2];
    for (int i = 0; i < 2; i++)
        half[i] = __builtin_shufflevector(a[2 * i], a[2 * i + 1] ESRL_LANES(ESRL_MIX_LOW)) +
                  __builtin_shufflevector(a[2 * i], a[2 * i + 1] ESRL_LANES(ESRL_MIX_HIGH));
    const vec sums = __builtin_shufflevector(half[0], half[1] ESRL_LANES(ESRL_PAIR_LOW)) +
                     __builtin_shufflevector(half[0], half[1] ESRL_LANES(ESRL_PAIR_HIGH));
#if defined(__AVX512F__)
    const auto half_sums = __builtin_shufflevector(sums, sums, 0, 1, 2, 3, 4, 5, 6, 7) +
                           __builtin_shufflevector(sums, sums, 8, 9, 10, 11, 12, 13, 14, 15);
#else
    const auto half_sums = sums;
#endif
#if defined(__AVX__)
    const auto four = __builtin_shufflevector(half_sums, half_sums, 0, 1, 2, 3) +
                      __builtin_shufflevector(half_sums, half_sums, 4, 5, 6, 7);
#else
    const auto four = half_sums;
#endif
    std::memcpy(to, &four, 4 * sizeof(float));
}

static inline float total(vec a) {
    const vec four[4] = {a, vec{}, vec{}, vec{}};
    float to[4];
    four_totals(four, to);
    return to[0];
}

static inline float largest(vec a) {
    float best = a[0];
    for (int i = 1; i < W; i++) best = a[i] > best ? a[i] : best;
    return best;
}

// Lane i of the result: of a 2 * SIZE wide piece the first half (or the second) comes from a, the rest from b.
template <int SIZE, bool SECOND, int... I>
static inline vec halves(vec a, vec b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, (I / SIZE % 2 ? W + I - SIZE + (SECOND ? SIZE : 0) : I + (SECOND ? SIZE : 0))...);
}

// A square of W x W numbers, its rows vectors: rows become columns.
template <int SIZE = W / 2>
static inline void transpose(vec* rows) {
    constexpr auto lanes = std::make_integer_sequence<int, W>();
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) {
        if (i / SIZE % 2) continue;
        const vec a = rows[i], b = rows[i + SIZE];
        rows[i] = halves<SIZE, false>(a, b, lanes);
        rows[i + SIZE] = halves<SIZE, true>(a, b, lanes);
    }
    if constexpr (SIZE > 1) transpose<SIZE / 2>(rows);
}

// exp(x) for x <= 0, to about two units in the last place; exactly 0 below -87 and at minus infinity. What is not a
// number stays so: nothing may hide it.
static inline vec exp_negative(vec x) {
    const vec lowest = all(-87.0f);
    const ints there = ~(x < lowest);
    x = x < lowest ? lowest : x;
    const ints power = __builtin_convertvector(x * 1.44269504f - 0.5f, ints);  // rounds, since x <= 0
    const vec n = __builtin_convertvector(power, vec);
    const vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vec p = all(1.9875691500e-4f);  // Cephes, expf
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const ints scale = (power + 127) << 23;
    return (vec)((ints)(p * (vec)scale) & there);
}

}  // namespace esrl
