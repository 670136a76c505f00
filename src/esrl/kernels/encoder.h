// A post-norm Transformer encoder (Vaswani et al. 2017) over the real tokens of prompts, padding left out, and the keys
// and values that a decoder's layers read: what Marian models are.
#pragma once
#include "marian.h"

namespace esrl {

constexpr int64_t TOGETHER = 4 * TILE;  // queries of a head whose scores exist at a time
constexpr int64_t ENCODED = 1024;       // tokens encoded at a time, or one prompt: what they need stays near

struct EncoderLayer {
    Linear query, key, value, mixed, inner, outer;
    Norm norm, final_norm;
};

struct Encoder {
    const float *embedding, *positions;  // (V, D), (positions, D)
    double scale;                        // of embeddings
    int64_t width, heads, inner, num_layers, num_readers;
    const EncoderLayer* layers;
    const Linear *keys, *values;  // of the decoder's layers, num_readers of them
};

// Real tokens, those of a prompt side by side: from starts[p] to starts[p + 1].
struct Sources {
    const int64_t *tokens, *positions, *starts;
    int64_t prompts, length;  // length: of the longest with its padding, S
};

// What a thread needs for a head of a prompt: its keys and values laid out as weights, and the scores of some queries.
struct Head {
    std::vector<float> keys, values, none, scores;

    Head(int64_t width, int64_t longest)
        : keys(filled(longest) * width), values(longest * filled(width)), none(filled(std::max(width, longest))),
          scores(TOGETHER * (filled(longest) + 2 * W)) {}
    static int64_t filled(int64_t outputs) { return (outputs + BLOCK - 1) / BLOCK * BLOCK; }
};

// All n queries of a head over the n keys and values of their prompt: two products, as many queries at a time as stay near.
static void attend_all(Rows queries, Rows keys, Rows values, int64_t n, int64_t width, Head& head, Rows out) {
    const Team alone{0, 1};
    const float scale = 1.0f / std::sqrt(float(width));
    lay_out(keys, n, width, head.keys.data(), alone);
    for (int64_t i = 0; i < Head::filled(n) * width; i += W) store(&head.keys[i], load(&head.keys[i]) * scale);
    for (int64_t column = 0; column < width; column += BLOCK)
        for (int64_t i = 0; i < n; i++)
            for (int64_t j = 0; j < std::min<int64_t>(BLOCK, width - column); j += W)
                store(&head.values[column * n + i * BLOCK + j], load(values.row(i) + column + j));
    const Linear score{head.keys.data(), head.none.data(), width, n, NONE, false},
        mix{head.values.data(), head.none.data(), n, width, NONE, false};
    const Rows scores{head.scores.data(), Head::filled(n) + 2 * W};
    for (int64_t q = 0; q < n; q += TOGETHER) {
        const int64_t count = std::min(TOGETHER, n - q);
        float shares[TOGETHER];
        linear(score, {queries.row(q), queries.stride}, count, scores, nullptr, alone);
        for (int64_t j = 0; j < count; j++) shares[j] = weigh(scores.row(j), n);
        linear(mix, scores, count, {out.row(q), out.stride}, nullptr, alone);
        for (int64_t j = 0; j < count; j++)
            for (int64_t i = 0; i < width; i += W) store(out.row(q + j) + i, load(out.row(q + j) + i) / shares[j]);
    }
}

// Prompts first ... last - 1 -> their keys and values (P, H, S, d) for each reader. All threads of a team call it.
static void encode(const Encoder& encoder, const Sources& sources, int64_t first, int64_t last, float* room,
                   float* const* keys, float* const* values) {
    const int64_t begin = sources.starts[first], count = sources.starts[last] - begin, width = encoder.width;
    const int64_t wide = 3 * width + W, narrow = width + W;
    const Rows hidden{room, narrow}, mixed{room + count * narrow, narrow}, query{room + 2 * count * narrow, wide},
        key{query.at + width, wide}, value{query.at + 2 * width, wide}, inner{query.at + count * wide, encoder.inner + W};
    float* for_tiles = inner.at + count * inner.stride;
    const Team team;
    int64_t longest = 0;
    for (int64_t p = first; p < last; p++) longest = std::max(longest, sources.starts[p + 1] - sources.starts[p]);
    const int64_t each = width / encoder.heads;  // numbers of a head
    Head own(each, longest);
    const auto norm = [&](const Norm& norm) {
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t r = 0; r < count; r++) normalize(norm, hidden.row(r), hidden.row(r), width);
    };
#pragma omp for schedule(static)
    for (int64_t r = 0; r < count; r++)
        for (int64_t i = 0; i < width; i += W)
            store(hidden.row(r) + i,
                  load(encoder.embedding + sources.tokens[begin + r] * width + i) * float(encoder.scale) +
                      load(encoder.positions + sources.positions[begin + r] * width + i));
    for (int64_t l = 0; l < encoder.num_layers; l++) {
        const EncoderLayer& layer = encoder.layers[l];
        const Linear* next = l + 1 < encoder.num_layers ? &encoder.layers[l + 1].query : encoder.keys;
        linear(layer.query, hidden, count, query, nullptr, team, &layer.key, for_tiles);
        linear(layer.key, hidden, count, key, nullptr, team, &layer.value, for_tiles);
        linear(layer.value, hidden, count, value, nullptr, team, &layer.mixed, for_tiles);
#pragma omp barrier
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < (last - first) * encoder.heads; task++) {
            const int64_t prompt = first + task / encoder.heads, at = task % encoder.heads * each;
            const int64_t row = sources.starts[prompt] - begin, n = sources.starts[prompt + 1] - sources.starts[prompt];
            attend_all({query.row(row) + at, wide}, {key.row(row) + at, wide}, {value.row(row) + at, wide}, n, each, own,
                       {mixed.row(row) + at, narrow});
        }
        linear(layer.mixed, mixed, count, hidden, &hidden, team, &layer.inner, for_tiles);
        norm(layer.norm);
        linear(layer.inner, hidden, count, inner, nullptr, team, &layer.outer, for_tiles);
#pragma omp barrier
        linear(layer.outer, inner, count, hidden, &hidden, team, next, for_tiles);
        norm(layer.final_norm);
    }
    for (int64_t l = 0; l < encoder.num_readers; l++) {
        linear(encoder.keys[l], hidden, count, key, nullptr, team, &encoder.values[l], for_tiles);
        linear(encoder.values[l], hidden, count, value, nullptr, team,
               l + 1 < encoder.num_readers ? &encoder.keys[l + 1] : nullptr, for_tiles);
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t task = 0; task < (last - first) * encoder.heads; task++) {
            const int64_t prompt = first + task / encoder.heads, head = task % encoder.heads;
            for (int64_t i = sources.starts[prompt]; i < sources.starts[prompt + 1]; i++) {
                const int64_t to = ((prompt * encoder.heads + head) * sources.length + sources.positions[i]) * each;
                std::memcpy(keys[l] + to, key.row(i - begin) + head * each, each * sizeof(float));
                std::memcpy(values[l] + to, value.row(i - begin) + head * each, each * sizeof(float));
            }
        }
    }
}

}  // namespace esrl
