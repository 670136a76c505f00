// Attention with a gradient: rows of queries over the keys and values of their item, a prompt or the row itself.
//
// Weights are computed anew on the way back. A head of an item is one task, so nobody else adds to its gradients.
#pragma once
#include "attention.h"

namespace esrl {

// (items, positions, heads, d): numbers between one and the next of each; those of a head are side by side.
struct Heads {
    float* at;
    int64_t item, position, head;
    float* of(int64_t i, int64_t h) const { return at + i * item + h * head; }
};

struct Attention {
    Heads query, key, value, out;
    Heads query_gradient, key_gradient, value_gradient, out_gradient;  // the way back only
    const int64_t *rows, *starts;  // rows of item p: rows[starts[p]] ... ; null: row p alone
    const uint8_t* mask;           // (items, keys), 0 where nothing may be read; null: everything may
    int64_t items, heads, queries, keys;
    int64_t causal;  // query i reads the keys up to i
};

// What a thread needs for a group of queries.
struct Weights {
    int64_t room;
    std::vector<float> weights, gradients;
    explicit Weights(int64_t keys) : room(keys + 2 * W), weights(QUERIES * room), gradients(QUERIES * room) {}
};

// The weights of Q queries, one after the other, over the first n keys; `from` is the first query's position.
template <int V, int Q>
static void weights_of(const Attention& a, int64_t item, const float* const* query, const float* keys, int64_t n,
                       int64_t from, float* weights, int64_t room) {
    score<V, Q>(query, keys, n, a.key.position, weights, room);
    for (int j = 0; j < Q; j++) {
        float* own = weights + j * room;
        if (a.causal)
            for (int64_t i = from + j + 1; i < n; i++) own[i] = NEVER;
        if (a.mask)
            for (int64_t i = 0; i < n; i++) own[i] = a.mask[item * a.keys + i] ? own[i] : NEVER;
        const vec share = all(1 / weigh(own, n));
        for (int64_t i = 0; i < n; i += W) store(own + i, load(own + i) * share);
    }
}

// f(Q, row, from): all queries of an item, a few at a time.
template <class F>
static void each_group(const Attention& a, int64_t item, F f) {
    const int64_t begin = a.rows ? a.starts[item] : item, end = a.rows ? a.starts[item + 1] : item + 1;
    for (int64_t r = begin; r < end; r++)
        for (int64_t from = 0; from < a.queries; from += QUERIES)
            with_queries(a.queries - from, [&](auto count) { f(count, a.rows ? a.rows[r] : r, from); });
}

template <int V>
static void attention_forward(const Attention& a, int64_t item, int64_t head, Weights& own) {
    const float *keys = a.key.of(item, head), *values = a.value.of(item, head);
    each_group(a, item, [&](auto count, int64_t row, int64_t from) {
        constexpr int Q = decltype(count)::value;
        const int64_t n = a.causal ? from + Q : a.keys;
        const float* query[Q];
        for (int j = 0; j < Q; j++) query[j] = a.query.of(row, head) + (from + j) * a.query.position;
        weights_of<V, Q>(a, item, query, keys, n, from, own.weights.data(), own.room);
        vec sum[Q][V] = {};
        mix<V, Q>(own.weights.data(), own.room, values, n, a.value.position, sum);
        for (int j = 0; j < Q; j++)
            for (int v = 0; v < V; v++) store(a.out.of(row, head) + (from + j) * a.out.position + v * W, sum[j][v]);
    });
}

// to[i] += sum over queries of weights[j][i] * from[j].
template <int V, int Q>
static void add_to_keys(const float* weights, int64_t room, const float* const* from, float* to, int64_t stride, int64_t n) {
    vec own[Q][V];
    for (int j = 0; j < Q; j++)
        for (int v = 0; v < V; v++) own[j][v] = load(from[j] + v * W);
    for (int64_t i = 0; i < n; i++, to += stride)
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) {
            vec sum = load(to + v * W);
            for (int j = 0; j < Q; j++) sum += weights[j * room + i] * own[j][v];
            store(to + v * W, sum);
        }
}

template <int V>
static void attention_backward(const Attention& a, int64_t item, int64_t head, Weights& own) {
    const float *keys = a.key.of(item, head), *values = a.value.of(item, head);
    float *of_keys = a.key_gradient.of(item, head), *of_values = a.value_gradient.of(item, head);
    for (int64_t i = 0; i < a.keys; i++) {
        std::memset(of_keys + i * a.key_gradient.position, 0, V * W * sizeof(float));
        std::memset(of_values + i * a.value_gradient.position, 0, V * W * sizeof(float));
    }
    float *weights = own.weights.data(), *gradients = own.gradients.data();
    each_group(a, item, [&](auto count, int64_t row, int64_t from) {
        constexpr int Q = decltype(count)::value;
        const int64_t n = a.causal ? from + Q : a.keys, room = own.room;
        const float *query[Q], *of_out[Q];
        for (int j = 0; j < Q; j++) {
            query[j] = a.query.of(row, head) + (from + j) * a.query.position;
            of_out[j] = a.out_gradient.of(row, head) + (from + j) * a.out_gradient.position;
        }
        weights_of<V, Q>(a, item, query, keys, n, from, weights, room);
        score<V, Q>(of_out, values, n, a.value.position, gradients, room);  // scaled, as those of the scores are
        for (int j = 0; j < Q; j++) {
            float *w = weights + j * room, *g = gradients + j * room;
            store(g + n, vec{});  // behind the last key weights are 0
            vec sum = {};
            for (int64_t i = 0; i < n; i += W) sum += load(w + i) * load(g + i);
            const vec mean = all(total(sum));
            for (int64_t i = 0; i < n; i += W) store(g + i, load(w + i) * (load(g + i) - mean));
        }
        vec sum[Q][V] = {};
        mix<V, Q>(gradients, room, keys, n, a.key.position, sum);
        for (int j = 0; j < Q; j++)
            for (int v = 0; v < V; v++)
                store(a.query_gradient.of(row, head) + (from + j) * a.query_gradient.position + v * W, sum[j][v]);
        add_to_keys<V, Q>(gradients, room, query, of_keys, a.key_gradient.position, n);
        add_to_keys<V, Q>(weights, room, of_out, of_values, a.value_gradient.position, n);
    });
}

// All heads of all items, by the threads of a team.
template <int V>
static void attention(const Attention& a, bool back) {
    Weights own(a.keys);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < a.items * a.heads; task++)
        if (back)
            attention_backward<V>(a, task / a.heads, task % a.heads, own);
        else
            attention_forward<V>(a, task / a.heads, task % a.heads, own);
}

}  // namespace esrl
