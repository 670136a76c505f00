// Attention over keys and values in memory. All numbers of a head are V whole vectors.
#pragma once
#include <limits>
#include <type_traits>

#include "linear.h"

namespace esrl {

constexpr int QUERIES = 4;  // queries that read a key together
constexpr int SUMS = W == 16 ? 16 : 8;  // vectors added up in registers at a time
constexpr float NEVER = -std::numeric_limits<float>::infinity();

// f(Q), Q a constant: as many queries as there are, at most QUERIES.
template <class F>
static inline void with_queries(int64_t count, F f) {
    if (count >= 4) f(std::integral_constant<int, 4>());
    if (count == 3) f(std::integral_constant<int, 3>());
    if (count == 2) f(std::integral_constant<int, 2>());
    if (count == 1) f(std::integral_constant<int, 1>());
}

// f(V), V a constant: the vectors of a head.
template <class F>
static inline void with_vectors(int64_t count, F f) {
    if (count == 1) f(std::integral_constant<int, 1>());
    if (count == 2) f(std::integral_constant<int, 2>());
    if (count == 4) f(std::integral_constant<int, 4>());
    if (count == 8) f(std::integral_constant<int, 8>());
    if (count == 16) f(std::integral_constant<int, 16>());
}

// Products of Q queries with n keys, `stride` numbers apart, to scores[query * room + key]; up to three more are written.
template <int V, int Q>
static void score(const float* const* query, const float* keys, int64_t n, int64_t stride, float* scores, int64_t room) {
    constexpr int K = Q > 2 ? 2 : 4;  // keys at a time; what a product is does not depend on it
    const float scale = 1.0f / std::sqrt(float(V * W));
    vec q[Q][V];
    for (int j = 0; j < Q; j++)
        for (int v = 0; v < V; v++) q[j][v] = load(query[j] + v * W) * scale;
    for (int64_t i = 0; i < n; i += K) {
        const float* key[K];
        for (int k = 0; k < K; k++) key[k] = keys + std::min(i + k, n - 1) * stride;
        vec dots[8] = {};  // those of a query side by side
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) {
            vec numbers[K];
            for (int k = 0; k < K; k++) numbers[k] = in_register(load(key[k] + v * W));
            for (int j = 0; j < Q; j++) {
                const vec own = in_register(q[j][v]);
                for (int k = 0; k < K; k++) dots[j * K + k] += own * numbers[k];
            }
        }
        float totals[8];
        four_totals(dots, totals);
        if (Q * K > 4) four_totals(dots + 4, totals + 4);
        for (int j = 0; j < Q; j++) std::memcpy(scores + j * room + i, totals + j * K, K * sizeof(float));
    }
}

// In place: n scores and room for another vector -> exp(score - largest), 0 behind them; gives their sum.
static inline float weigh(float* scores, int64_t n) {
    store(scores + n, all(NEVER));
    vec most = all(NEVER);
    for (int64_t i = 0; i < n; i += W) most = larger(most, load(scores + i));
    const float top = largest(most);
    vec sum = {};
    for (int64_t i = 0; i < n; i += W) {
        const vec weight = exp_negative(load(scores + i) - top);
        store(scores + i, weight);
        sum += weight;
    }
    return total(sum);
}

// sum += weights times n values, `stride` numbers apart: as many sums at a time as registers hold, over a piece of the
// values that is still near when the next sums want it.
template <int V, int Q>
static void mix(const float* weights, int64_t room, const float* values, int64_t n, int64_t stride, vec (*sum)[V]) {
    constexpr int C = V * Q <= SUMS ? V : SUMS / Q >= 4 ? 4 : SUMS / Q >= 2 ? 2 : 1;
    constexpr int64_t PIECE = 8;
    for (int64_t from = 0; from < n; from += PIECE) {
        const int64_t to = std::min(n, from + PIECE);
        for (int v = 0; v < V; v += C) {
            vec own[Q][C];
            for (int j = 0; j < Q; j++)
                for (int c = 0; c < C; c++) own[j][c] = sum[j][v + c];
            for (int64_t i = from; i < to; i++) {
                vec numbers[C];
                for (int c = 0; c < C; c++) numbers[c] = in_register(load(values + i * stride + (v + c) * W));
                for (int j = 0; j < Q; j++) {
                    const float weight = weights[j * room + i];
                    for (int c = 0; c < C; c++) own[j][c] += weight * numbers[c];
                }
            }
            for (int j = 0; j < Q; j++)
                for (int c = 0; c < C; c++) sum[j][v + c] = own[j][c];
        }
    }
}

template <int V, int Q>
static void finish(const vec (*sum)[V], const float* shares, float* const* out) {
    for (int j = 0; j < Q; j++)
        for (int v = 0; v < V; v++) store(out[j] + v * W, sum[j][v] / shares[j]);
}

// Q queries over the same n keys and values. mask: n bytes, 0 where nothing may be read; null: everything may.
template <int V, int Q>
static void attend(const float* const* query, const float* keys, const float* values, int64_t n, const uint8_t* mask,
                   float* scores, int64_t room, float* const* out) {
    score<V, Q>(query, keys, n, V * W, scores, room);
    float shares[Q];
    for (int j = 0; j < Q; j++) {
        if (mask)
            for (int64_t i = 0; i < n; i++) scores[j * room + i] = mask[i] ? scores[j * room + i] : NEVER;
        shares[j] = weigh(scores + j * room, n);
    }
    vec sum[Q][V] = {};
    mix<V, Q>(scores, room, values, n, V * W, sum);
    finish<V, Q>(sum, shares, out);
}

}  // namespace esrl
