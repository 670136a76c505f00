// Attention over keys and values in memory. All numbers of a head are V whole vectors.
#pragma once
#include <limits>

#include "linear.h"

namespace esrl {

constexpr int QUERIES = 4;  // queries that read a key together
constexpr float NEVER = -std::numeric_limits<float>::infinity();

// Products of Q queries with n keys, `stride` numbers apart, to scores[query * room + key]; up to three more are written.
template <int V, int Q>
static void score(const float* const* query, const float* keys, int64_t n, int64_t stride, float* scores, int64_t room) {
    constexpr int K = 4 / Q;  // keys at a time; what a product is does not depend on it
    const float scale = 1.0f / std::sqrt(float(V * W));
    vec q[Q][V];
    for (int j = 0; j < Q; j++)
        for (int v = 0; v < V; v++) q[j][v] = load(query[j] + v * W) * scale;
    for (int64_t i = 0; i < n; i += K) {
        vec dots[4] = {};
        for (int k = 0; k < K; k++) {
            const float* key = keys + std::min(i + k, n - 1) * stride;
            for (int v = 0; v < V; v++) {
                const vec numbers = load(key + v * W);
                for (int j = 0; j < Q; j++) dots[j * K + k] += q[j][v] * numbers;
            }
        }
        float totals[4];
        four_totals(dots, totals);
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

// sum += weights times n values, `stride` numbers apart.
template <int V, int Q>
static void mix(const float* weights, int64_t room, const float* values, int64_t n, int64_t stride, vec (*sum)[V]) {
    vec own[Q][V];
    std::memcpy(own, sum, sizeof(own));
    for (int64_t i = 0; i < n; i++)
        for (int v = 0; v < V; v++) {
            const vec numbers = load(values + i * stride + v * W);
            for (int j = 0; j < Q; j++) own[j][v] += weights[j * room + i] * numbers;
        }
    std::memcpy(sum, own, sizeof(own));
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
