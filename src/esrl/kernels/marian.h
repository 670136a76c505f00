// A step of a post-norm Transformer decoder (Vaswani et al. 2017) with cross-attention: what Marian models are.
//
// What a row has decoded lies in pages of a few positions, so that memory follows the tokens there are: a page holds the
// keys and values of all layers. Rows of one prompt read its keys and values together.
#pragma once
#include <new>
#include <numeric>
#include <vector>

#include "attention.h"
#include "pool.h"

namespace esrl {

struct Norm {
    const float *scale, *shift;
    double epsilon;
};

struct Layer {
    Linear query, key, value, mixed, cross_query, cross_mixed, inner, outer;
    Norm norm, cross_norm, final_norm;
};

struct Marian {
    const float *embedding, *positions;  // (V, D), (positions, D)
    double scale;                        // of embeddings
    int64_t width, heads, inner, num_layers;
    const Layer* layers;
};

// A batch of prompts: each layer's keys and values (P, H, S, d); mask (P, S), or null.
struct Prompts {
    const float* const* keys;
    const float* const* values;
    const uint8_t* mask;
    int64_t length;
};

constexpr int64_t PAGE = 8;  // positions of a page

struct Row {
    const Prompts* prompts;
    int64_t prompt, position;
    std::vector<float*> pages;
    int64_t id = 0;  // of whoever asks for the row
};

// Rows of one prompt: first ... last in the order of prompts.
struct Group {
    int64_t first, last;
};

struct Decoder {
    const Marian* model;
    int64_t threads;
    std::vector<Row> rows;
    std::vector<int64_t> order;  // rows, those of a prompt together
    std::vector<Group> groups;
    std::vector<float*> free_pages;
    std::vector<float> room;  // activations

    float* new_page() {
        if (free_pages.empty()) {
            void* made = take(model->num_layers * 2 * PAGE * model->width * sizeof(float));
            if (!made) throw std::bad_alloc();
            return static_cast<float*>(made);
        }
        float* taken = free_pages.back();
        free_pages.pop_back();
        return taken;
    }

    void arrange() {
        order.resize(rows.size());
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [this](int64_t a, int64_t b) {
            return std::pair(rows[a].prompts, rows[a].prompt) < std::pair(rows[b].prompts, rows[b].prompt);
        });
        groups.clear();
        for (int64_t i = 0; i < int64_t(order.size()); i++) {
            const Row& row = rows[order[i]];
            if (!groups.empty()) {
                Group& last = groups.back();
                const Row& other = rows[order[last.first]];
                if (other.prompts == row.prompts && other.prompt == row.prompt) {
                    last.last++;
                    continue;
                }
            }
            groups.push_back({i, i + 1});
        }
    }

    // Go on with these rows, in this order; each at most once.
    void keep(const int64_t* kept, int64_t count) {
        std::vector<Row> next;
        next.reserve(count);
        for (int64_t r = 0; r < count; r++) next.push_back(std::move(rows[kept[r]]));
        for (Row& row : rows) free_pages.insert(free_pages.end(), row.pages.begin(), row.pages.end());
        rows = std::move(next);
        arrange();
    }

    ~Decoder() {
        for (Row& row : rows)
            for (float* page : row.pages) give(page);
        for (float* page : free_pages) give(page);
    }
};

static inline void normalize(const Norm& norm, const float* from, float* to, int64_t width) {
    vec sum = {}, squares = {};
    for (int64_t i = 0; i < width; i += W) sum += load(from + i);
    const float mean = total(sum) / width;
    for (int64_t i = 0; i < width; i += W) {
        const vec part = load(from + i) - mean;
        squares += part * part;
    }
    const float factor = 1.0f / std::sqrt(total(squares) / width + float(norm.epsilon));
    for (int64_t i = 0; i < width; i += W)
        store(to + i, (load(from + i) - mean) * factor * load(norm.scale + i) + load(norm.shift + i));
}

// Page of a row that holds a position; then the layer's keys, its values behind them.
static inline float* layer_of(const Marian& model, float* page, int64_t layer) {
    return page + layer * 2 * PAGE * model.width;
}

// A sum of values.
template <int V>
struct Sum {
    vec parts[1][V];
};

// Page after page, all heads of each: a page's keys lie side by side, and so do its values. `scores`: room for n + PAGE + W
// numbers a head.
template <int V>
static void self_attention(const Marian& model, const Row& row, int64_t layer, const float* query, float* scores,
                           Sum<V>* sums, float* out) {
    const int64_t n = row.position + 1, width = model.width, room = n + PAGE + W, last = (n - 1) / PAGE;
    const auto keys = [&](int64_t page) { return layer_of(model, row.pages[page], layer); };
    const auto values = [&](int64_t page) { return keys(page) + PAGE * width; };
    const auto filled = [&](int64_t page) { return std::min(PAGE, n - page * PAGE); };
    for (int64_t page = 0; page <= last; page++) {
        fetch(page < last ? keys(page + 1) : values(0), filled(page < last ? page + 1 : 0) * width);
        for (int64_t head = 0; head < model.heads; head++) {
            const float* own = query + head * V * W;
            score<V, 1>(&own, keys(page) + head * V * W, filled(page), width,
                        scores + head * room + page * PAGE, 0);
        }
    }
    for (int64_t head = 0; head < model.heads; head++) {
        scores[head * room + n] = weigh(scores + head * room, n);  // behind the weights, where nothing else is read
        sums[head] = {};
    }
    for (int64_t page = 0; page <= last; page++) {
        if (page < last) fetch(values(page + 1), filled(page + 1) * width);
        for (int64_t head = 0; head < model.heads; head++)
            mix<V, 1>(scores + head * room + page * PAGE, 0, values(page) + head * V * W, filled(page), width,
                      sums[head].parts);
    }
    for (int64_t head = 0; head < model.heads; head++) {
        float* to = out + head * V * W;
        finish<V, 1>(sums[head].parts, scores + head * room + n, &to);
    }
}

// A head of a prompt's rows, QUERIES of them after the other: its keys and values are read from memory once.
template <int V>
static void cross_attention(const Decoder& decoder, Group group, int64_t layer, int64_t head, Rows queries, Rows out,
                            std::vector<float>& scores) {
    const Row& first = decoder.rows[decoder.order[group.first]];
    const Prompts& prompts = *first.prompts;
    const int64_t heads = decoder.model->heads, n = prompts.length, room = n + W;
    const int64_t at = (first.prompt * heads + head) * n * V * W;
    const uint8_t* mask = prompts.mask ? prompts.mask + first.prompt * n : nullptr;
    const float *keys = prompts.keys[layer] + at, *values = prompts.values[layer] + at;
    if (int64_t(scores.size()) < QUERIES * room) scores.resize(QUERIES * room);
    for (int64_t begin = group.first; begin < group.last; begin += QUERIES) {
        const float* query[QUERIES];
        float* to[QUERIES];
        const int64_t size = std::min<int64_t>(QUERIES, group.last - begin);
        for (int64_t j = 0; j < size; j++) {
            query[j] = queries.row(decoder.order[begin + j]) + head * V * W;
            to[j] = out.row(decoder.order[begin + j]) + head * V * W;
        }
        with_queries(size, [&](auto count) {
            attend<V, decltype(count)::value>(query, keys, values, n, mask, scores.data(), room, to);
        });
    }
}

// All threads of a team call it; `hidden` has the result. `after` is read next, or null.
template <int V>
static void layers(Decoder& decoder, const int64_t* tokens, Rows hidden, Rows projected, Rows mixed, Rows inner,
                   const Linear* after) {
    const Marian& model = *decoder.model;
    const int64_t count = decoder.rows.size(), width = model.width, groups = decoder.groups.size();
    const Team team;
    int64_t longest = 0;
    for (const Row& row : decoder.rows) longest = std::max(longest, row.position + 1);
    std::vector<float> scores((longest + PAGE + W) * model.heads);
    std::vector<Sum<V>> sums(model.heads);
    const Rows query{projected.at, projected.stride}, key{projected.at + width, projected.stride},
        value{projected.at + 2 * width, projected.stride};
    const auto norm = [&](const Norm& norm) {
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t r = 0; r < count; r++) normalize(norm, hidden.row(r), hidden.row(r), width);
    };
#pragma omp for schedule(static)
    for (int64_t r = 0; r < count; r++)
        for (int64_t i = 0; i < width; i += W)
            store(hidden.row(r) + i, load(model.embedding + tokens[r] * width + i) * float(model.scale) +
                                         load(model.positions + decoder.rows[r].position * width + i));
    for (int64_t l = 0; l < model.num_layers; l++) {
        const Layer& layer = model.layers[l];
        const Linear* next = l + 1 < model.num_layers ? &model.layers[l + 1].query : after;
        linear(layer.query, hidden, count, query, nullptr, team, &layer.key);
        linear(layer.key, hidden, count, key, nullptr, team, &layer.value);
        linear(layer.value, hidden, count, value, nullptr, team, &layer.mixed);
#pragma omp barrier
#pragma omp for schedule(dynamic, 4)
        for (int64_t r = 0; r < count; r++) {
            const Row& row = decoder.rows[r];
            float* place = layer_of(model, row.pages[row.position / PAGE], l) + row.position % PAGE * width;
            std::memcpy(place, key.row(r), width * sizeof(float));
            std::memcpy(place + PAGE * width, value.row(r), width * sizeof(float));
            self_attention<V>(model, row, l, query.row(r), scores.data(), sums.data(), mixed.row(r));
        }
        linear(layer.mixed, mixed, count, hidden, &hidden, team, &layer.cross_query);
        norm(layer.norm);
        linear(layer.cross_query, hidden, count, query, nullptr, team, &layer.cross_mixed);
#pragma omp barrier
        // head after head: a thread then has, by and large, the queries that it has computed itself
        for (int64_t task = team.begin(groups * model.heads); task < team.end(groups * model.heads); task++)
            cross_attention<V>(decoder, decoder.groups[task % groups], l, task / groups, query, mixed, scores);
#pragma omp barrier
        linear(layer.cross_mixed, mixed, count, hidden, &hidden, team, &layer.inner);
        norm(layer.cross_norm);
        linear(layer.inner, hidden, count, inner, nullptr, team, &layer.outer);
#pragma omp barrier
        linear(layer.outer, inner, count, hidden, &hidden, team, next);
        norm(layer.final_norm);
    }
}

// Last tokens -> (rows, width) states for the next ones.
static void step(Decoder& decoder, const int64_t* tokens, Rows hidden, const Linear* after = nullptr) {
    const Marian& model = *decoder.model;
    const int64_t rows = decoder.rows.size(), width = model.width;
    for (Row& row : decoder.rows)
        if (row.position % PAGE == 0) row.pages.push_back(decoder.new_page());
    // a row's end is not a whole number of pages from the next one's: rows would share a few places in the cache
    const int64_t wide = 3 * width + W, narrow = width + W, inner = model.inner + W;
    decoder.room.resize(rows * (wide + narrow + inner));
    float* at = decoder.room.data();
    const Rows projected{at, wide}, mixed{at + rows * wide, narrow}, between{at + rows * (wide + narrow), inner};
    with_vectors(width / model.heads / W, [&](auto vectors) {
#pragma omp parallel num_threads(decoder.threads)
        layers<decltype(vectors)::value>(decoder, tokens, hidden, projected, mixed, between, after);
    });
    for (int64_t l = 0; l < model.num_layers; l++) {
        const Layer& layer = model.layers[l];
        for (const Linear* each : {&layer.query, &layer.key, &layer.value, &layer.mixed, &layer.cross_query,
                                   &layer.cross_mixed, &layer.inner, &layer.outer})
            count(*each, rows);
    }
    for (Row& row : decoder.rows) {
        row.position++;
        operations += 4 * model.num_layers * width * (row.position + row.prompts->length);
    }
}

}  // namespace esrl
