// Attention with a gradient: rows of queries over the keys and values of a prompt, or of the row itself.
//
// Weights are computed anew on the way back. A head of a prompt, or of a row, is one task: nobody else adds to its
// gradients.
#pragma once
#include <vector>

#include "attention.h"

namespace esrl {

// Numbers between one item (a prompt, or a token), one position, one head and the next; those of a head are side by side.
struct Heads {
    float* at;
    int64_t item, position, head;
    float* of(int64_t i, int64_t h) const { return at + i * item + h * head; }
};

struct Attention {
    Heads query, key, value, out;
    Heads query_gradient, key_gradient, value_gradient, out_gradient;  // the way back only
    const int64_t* starts;             // the tokens of row r: starts[r] ... starts[r + 1]
    const int64_t *rows, *first_rows;  // the rows of prompt p: rows[first_rows[p]] ...; null: a row reads itself
    const uint8_t* mask;               // (prompts, keys), 0 where nothing may be read; null: everything may
    int64_t items, heads, keys;        // prompts, or rows; keys of each prompt, or of the longest row

    bool own() const { return !rows; }  // a token then reads its row up to itself
    int64_t keys_of(int64_t item) const { return own() ? starts[item + 1] - starts[item] : keys; }
    int64_t first(int64_t item) const { return own() ? starts[item] : item; }
};

// What a thread needs for a group of queries.
struct Weights {
    int64_t room;
    std::vector<float> weights, gradients;
    explicit Weights(int64_t keys) : room(keys + 2 * W), weights(QUERIES * room), gradients(QUERIES * room) {}
};

// The weights of Q queries, one after the other, over the first n keys; `from` is the first query's place in its row.
template <int V, int Q>
static void weights_of(const Attention& a, int64_t item, const float* const* query, const float* keys, int64_t n,
                       int64_t from, float* weights, int64_t room) {
    score<V, Q>(query, keys, n, a.key.position, weights, room);
    for (int j = 0; j < Q; j++) {
        float* each = weights + j * room;
        if (a.own())
            for (int64_t i = from + j + 1; i < n; i++) each[i] = NEVER;
        if (a.mask)
            for (int64_t i = 0; i < n; i++) each[i] = a.mask[item * a.keys + i] ? each[i] : NEVER;
        const vec share = all(1 / weigh(each, n));
        for (int64_t i = 0; i < n; i += W) store(each + i, load(each + i) * share);
    }
}

// f(Q, token, from, n): the queries of an item, Q tokens at a time, the keys they read.
template <class F>
static void each_group(const Attention& a, int64_t item, F f) {
    const int64_t begin = a.own() ? item : a.first_rows[item], end = a.own() ? item + 1 : a.first_rows[item + 1];
    for (int64_t r = begin; r < end; r++) {
        const int64_t row = a.own() ? r : a.rows[r], length = a.starts[row + 1] - a.starts[row];
        for (int64_t from = 0; from < length; from += QUERIES)
            with_queries(length - from, [&](auto count) {
                f(count, a.starts[row] + from, from, a.own() ? from + decltype(count)::value : a.keys);
            });
    }
}

template <int V>
static void attention_forward(const Attention& a, int64_t item, int64_t head, Weights& room) {
    const float *keys = a.key.of(a.first(item), head), *values = a.value.of(a.first(item), head);
    each_group(a, item, [&](auto count, int64_t token, int64_t from, int64_t n) {
        constexpr int Q = decltype(count)::value;
        const float* query[Q];
        for (int j = 0; j < Q; j++) query[j] = a.query.of(token + j, head);
        weights_of<V, Q>(a, item, query, keys, n, from, room.weights.data(), room.room);
        vec sum[Q][V] = {};
        mix<V, Q>(room.weights.data(), room.room, values, n, a.value.position, sum);
        for (int j = 0; j < Q; j++)
            for (int v = 0; v < V; v++) store(a.out.of(token + j, head) + v * W, sum[j][v]);
    });
}

// to[i] += sum over queries of weights[j][i] * from[j].
template <int V, int Q>
static void add_to_keys(const float* weights, int64_t room, const float* const* from, float* to, int64_t stride, int64_t n) {
    for (int64_t i = 0; i < n; i++, to += stride)
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) {
            vec sum = load(to + v * W);
            for (int j = 0; j < Q; j++) sum += weights[j * room + i] * load(from[j] + v * W);
            store(to + v * W, sum);
        }
}

template <int V>
static void attention_backward(const Attention& a, int64_t item, int64_t head, Weights& room) {
    const float *keys = a.key.of(a.first(item), head), *values = a.value.of(a.first(item), head);
    float *of_keys = a.key_gradient.of(a.first(item), head), *of_values = a.value_gradient.of(a.first(item), head);
    for (int64_t i = 0; i < a.keys_of(item); i++) {
        std::memset(of_keys + i * a.key_gradient.position, 0, V * W * sizeof(float));
        std::memset(of_values + i * a.value_gradient.position, 0, V * W * sizeof(float));
    }
    float *weights = room.weights.data(), *gradients = room.gradients.data();
    each_group(a, item, [&](auto count, int64_t token, int64_t from, int64_t n) {
        constexpr int Q = decltype(count)::value;
        const float *query[Q], *of_out[Q];
        for (int j = 0; j < Q; j++) {
            query[j] = a.query.of(token + j, head);
            of_out[j] = a.out_gradient.of(token + j, head);
        }
        weights_of<V, Q>(a, item, query, keys, n, from, weights, room.room);
        score<V, Q>(of_out, values, n, a.value.position, gradients, room.room);  // scaled as the scores are
        for (int j = 0; j < Q; j++) {
            const float* w = weights + j * room.room;
            float* g = gradients + j * room.room;
            store(g + n, vec{});  // behind the last key weights are 0
            vec sum = {};
            for (int64_t i = 0; i < n; i += W) sum += load(w + i) * load(g + i);
            const vec mean = all(total(sum));
            for (int64_t i = 0; i < n; i += W) store(g + i, load(w + i) * (load(g + i) - mean));
        }
        vec sum[Q][V] = {};
        mix<V, Q>(gradients, room.room, keys, n, a.key.position, sum);
        for (int j = 0; j < Q; j++)
            for (int v = 0; v < V; v++) store(a.query_gradient.of(token + j, head) + v * W, sum[j][v]);
        add_to_keys<V, Q>(gradients, room.room, query, of_keys, a.key_gradient.position, n);
        add_to_keys<V, Q>(weights, room.room, of_out, of_values, a.value_gradient.position, n);
    });
}

// All heads of all items, by the threads of a team.
template <int V>
static void attention(const Attention& a, bool back) {
    Weights room(a.keys);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < a.items * a.heads; task++)
        if (back)
            attention_backward<V>(a, task / a.heads, task % a.heads, room);
        else
            attention_forward<V>(a, task / a.heads, task % a.heads, room);
}

// Multiplications and additions of a query with a key and a value; five products on the way back.
static int64_t attention_operations(const Attention& a, int64_t width, bool back) {
    int64_t pairs = 0;
    for (int64_t i = 0; i < a.items; i++) {
        if (a.own()) pairs += a.keys_of(i) * (a.keys_of(i) + 1) / 2;
        for (int64_t r = a.own() ? 0 : a.first_rows[i]; r < (a.own() ? 0 : a.first_rows[i + 1]); r++)
            pairs += (a.starts[a.rows[r] + 1] - a.starts[a.rows[r]]) * a.keys;
    }
    return (back ? 10 : 4) * a.heads * pairs * width;
}

}  // namespace esrl
