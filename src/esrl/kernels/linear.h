// Matrix products with weights laid out in blocks of BLOCK outputs: (outputs / BLOCK, inputs, BLOCK).
//
// A tile of at most TILE rows times BLOCK outputs stays in registers while the weights stream past once. Each output is
// the sum of the same numbers in the same order however many rows there are: results do not depend on the batch.
#pragma once
#include <atomic>

#include "tiles.h"

namespace esrl {

constexpr int TILE = W == 8 ? 6 : 12;      // rows of a tile: 24 sums of 32 registers (12 of 16 with AVX2)
constexpr int AHEAD = 64;                  // inputs that the prefetch runs ahead
constexpr int64_t CHAIN = 128;             // inputs summed in one chain; chains are added up: that is more exact

// Whether the next block of weights is fetched while one is computed: where that was measured to be faster.
#if defined(ESRL_FETCH_NEXT) && defined(__AVX512F__)
constexpr bool FETCH_NEXT = true;
#else
constexpr bool FETCH_NEXT = false;
#endif

// Numbers of rows that stay in a core's cache beside the weights; Intel's have 1 to 2 MB of it.
constexpr int64_t NEAR = (FETCH_NEXT ? 192 : 48) << 10;

struct Linear {
    const float* weight;  // laid out
    const float* bias;    // filled up to whole blocks
    int64_t inputs, outputs;
    int64_t activation;
    int64_t tiles;  // whether the product is in tiles: the weight is then as it is, not laid out
};

// Multiplications and additions of matrix products and attention so far: PyTorch's counter does not see them.
inline std::atomic<int64_t> operations{0};

static inline void count(const Linear& l, int64_t rows) { operations += 2 * rows * l.inputs * l.outputs; }

// A block of a layer's outputs: its weights laid out, its bias if there is one.
struct Block {
    const float *weight, *bias;
    int64_t inputs;
    int64_t there;  // outputs, BLOCK at most
    int64_t activation;
    const float* next = nullptr;  // what is read next: fetched while this is computed,
    int64_t step = 0;             // so many numbers for each input; 0: nothing
};

template <int M>
static void tile(const Block& b, Rows x, Rows out, const float* residual, int64_t stride) {
    vec sum[M][WIDE] = {};
    const float *w = b.weight, *next = b.next;
    for (int64_t from = 0; from < b.inputs; from += CHAIN) {
        vec part[M][WIDE] = {};
        const int64_t to = std::min(b.inputs, from + CHAIN);
#pragma GCC unroll 1
        for (int64_t i = from; i < to; i++, w += BLOCK) {
            vec weight[WIDE];
#pragma GCC unroll 8
            for (int n = 0; n < BLOCK; n += LINE) __builtin_prefetch(w + AHEAD * BLOCK + n);
            if (FETCH_NEXT && b.step) {
                __builtin_prefetch(next, 0, 2);
                if (b.step > LINE) __builtin_prefetch(next + LINE, 0, 2);
                next += b.step;
            }
#pragma GCC unroll 8
            for (int n = 0; n < WIDE; n++) weight[n] = in_register(load(w + n * W));
#pragma GCC unroll 16
            for (int m = 0; m < M; m++) {
                const float value = x.at[m * x.stride + i];
#pragma GCC unroll 8
                for (int n = 0; n < WIDE; n++) part[m][n] += value * weight[n];
            }
        }
#pragma GCC unroll 16
        for (int m = 0; m < M; m++)
#pragma GCC unroll 8
            for (int n = 0; n < WIDE; n++) sum[m][n] += part[m][n];
    }
    for (int m = 0; m < M; m++) {
        float numbers[BLOCK];
        for (int n = 0; n < WIDE; n++)
            store(numbers + n * W, activate(b.bias ? sum[m][n] + load(b.bias + n * W) : sum[m][n], b.activation));
        float* to = out.row(m);
        const float* add = residual ? residual + m * stride : nullptr;
        if (b.there == BLOCK) {
            for (int n = 0; n < WIDE; n++) {
                const vec value = load(numbers + n * W);
                store(to + n * W, add ? value + load(add + n * W) : value);
            }
        } else {
            for (int64_t j = 0; j < b.there; j++) to[j] = add ? numbers[j] + add[j] : numbers[j];
        }
    }
}

template <int M>
static inline void any_tile(int64_t m, const Block& b, Rows x, Rows out, const float* residual, int64_t stride) {
    if (m == M) return tile<M>(b, x, out, residual, stride);
    if constexpr (M > 1) any_tile<M - 1>(m, b, x, out, residual, stride);
}

// Where a thread's part of a layer begins.
static const float* first_block(const Linear& l, Team team) {
    return l.weight + team.begin((l.outputs + BLOCK - 1) / BLOCK) * BLOCK * l.inputs;
}

// `linear` in vectors: this thread's part.
//
// With FETCH_NEXT, while a block is computed the next one is on its way to the caches, after the last one that of the
// layer `after`: memory is then read evenly, not only while the first tile goes past new weights.
static void linear_in_vectors(const Linear& l, Rows x, int64_t rows, Rows out, const Rows* residual, Team team,
                              const Linear* after) {
    const int64_t blocks = (l.outputs + BLOCK - 1) / BLOCK, tiles = (rows + TILE - 1) / TILE;
    if (!tiles) return;
    // so many tiles at a time that their numbers stay near while a thread goes through its blocks
    const int64_t together = std::max<int64_t>(1, NEAR / (TILE * l.inputs)), parts = (tiles + together - 1) / together;
    // many threads divide the rows, too
    const int64_t groups = std::min(tiles, std::max<int64_t>(1, 4 * team.size / blocks));
    for (int64_t part = 0; part < parts; part++) {
        const int64_t from = tiles * part / parts, here = tiles * (part + 1) / parts - from;
        const int64_t divided = std::min(groups, here), last = team.end(blocks * divided);
        for (int64_t task = team.begin(blocks * divided); task < last; task++) {
            const int64_t column = task / divided * BLOCK, group = task % divided;
            Block block{l.weight + column * l.inputs, l.bias + column, l.inputs,
                        std::min<int64_t>(BLOCK, l.outputs - column), l.activation};
            const int64_t begin = from + here * group / divided, end = from + here * (group + 1) / divided;
            if (FETCH_NEXT) {
                if (task + 1 < last)
                    block.next = l.weight + (task + 1) / divided * BLOCK * l.inputs;
                else if (part + 1 < parts)
                    block.next = first_block(l, team);
                else if (after)
                    block.next = first_block(*after, team);
                if (block.next && block.next != block.weight) block.step = (BLOCK + end - begin - 1) / (end - begin);
            }
            for (int64_t i = begin; i < end; i++, block.next += block.step * l.inputs) {
                const int64_t row = rows * i / tiles, count = rows * (i + 1) / tiles - row;
                const float* add = residual ? residual->row(row) + column : nullptr;
                any_tile<TILE>(count, block, {x.row(row), x.stride}, {out.row(row) + column, out.stride}, add,
                               residual ? residual->stride : 0);
            }
        }
    }
}

// out = activation(x W' + b) [+ residual]. For all threads of a team together. `residual` may be where `out` is if there is
// no activation; `after` is the layer that comes next; `room` is for tiles.
static void linear(const Linear& l, Rows x, int64_t rows, Rows out, const Rows* residual, Team team,
                   const Linear* after = nullptr, float* room = nullptr) {
#ifdef ESRL_TILES
    if (l.tiles) {
        const Factor weight{{const_cast<float*>(l.weight), l.inputs}, true};
        return multiply_in_tiles({x, true}, weight, rows, l.inputs, l.outputs, {out, false, l.bias, residual, l.activation}, room,
                                 team);
    }
#endif
    (void)room;
    linear_in_vectors(l, x, rows, out, residual, team, after && !after->tiles ? after : nullptr);
}

// (there, inputs) of a weight -> (inputs, BLOCK); columns that fill up the block are 0.
static void lay_out_rows(Rows weight, int64_t there, int64_t inputs, float* to) {
    const int64_t whole = there == BLOCK ? inputs / W * W : 0;
    for (int64_t i = 0; i < whole; i += W)
        for (int n = 0; n < WIDE; n++) {
            vec square[W];
#pragma GCC unroll 16
            for (int j = 0; j < W; j++) {
                const float* from = weight.row(n * W + j) + i;
                __builtin_prefetch(from + 4 * LINE);
                square[j] = load(from);
            }
            transpose(square);
#pragma GCC unroll 16
            for (int d = 0; d < W; d++) store(to + (i + d) * BLOCK + n * W, square[d]);
        }
    for (int64_t i = whole; i < inputs; i++)
        for (int64_t j = 0; j < BLOCK; j++) to[i * BLOCK + j] = j < there ? weight.row(j)[i] : 0;
}

// (outputs, inputs) -> blocks, this thread's part; outputs that fill up the last block are 0.
static void lay_out(Rows weight, int64_t outputs, int64_t inputs, float* to, Team team) {
    const int64_t blocks = (outputs + BLOCK - 1) / BLOCK;
    for (int64_t block = team.begin(blocks); block < team.end(blocks); block++)
        lay_out_rows({weight.row(block * BLOCK), weight.stride}, std::min<int64_t>(BLOCK, outputs - block * BLOCK), inputs,
                     to + block * BLOCK * inputs);
}

}  // namespace esrl
