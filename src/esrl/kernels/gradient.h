// The gradient of a linear layer's weight: out[n][d] (+)= sum over rows r of gradient[r][n] * x[r][d].
//
// A tile of at most TILE outputs times BLOCK inputs stays in registers while the rows stream past. The rows of x are laid
// out in blocks of BLOCK inputs, (inputs / BLOCK, rows, BLOCK), for all threads; each thread lays out the gradient of a
// few tiles at a time. Each sum is taken in the same order however many threads there are.
#pragma once
#include "linear.h"

namespace esrl {

constexpr int64_t CHAINED = 256;  // rows summed in one chain; chains are added up in the result
constexpr int HELD = 8;           // tiles whose gradient a thread holds

template <int M>
static void gradient_tile(const float* gradient, const float* x, int64_t rows, Rows out, int64_t there, bool add) {
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
        for (int n = 0; n < BLOCK; n += LINE) __builtin_prefetch(out.row(m) + n, 1);
    vec sum[M][WIDE] = {};
#pragma GCC unroll 1
    for (int64_t r = 0; r < rows; r++, gradient += M, x += BLOCK) {
        vec value[WIDE];
#pragma GCC unroll 8
        for (int n = 0; n < WIDE; n++) value[n] = in_register(load(x + n * W));
#pragma GCC unroll 16
        for (int m = 0; m < M; m++)
#pragma GCC unroll 8
            for (int n = 0; n < WIDE; n++) sum[m][n] += gradient[m] * value[n];
    }
    for (int m = 0; m < M; m++) {
        float* to = out.row(m);
        if (there == BLOCK) {
            for (int n = 0; n < WIDE; n++) store(to + n * W, add ? load(to + n * W) + sum[m][n] : sum[m][n]);
        } else {
            float numbers[BLOCK];
            for (int n = 0; n < WIDE; n++) store(numbers + n * W, sum[m][n]);
            for (int64_t j = 0; j < there; j++) to[j] = add ? to[j] + numbers[j] : numbers[j];
        }
    }
}

template <int M>
static inline void any_gradient_tile(int64_t m, const float* g, const float* x, int64_t rows, Rows out, int64_t there,
                                     bool add) {
    if (m == M) return gradient_tile<M>(g, x, rows, out, there, add);
    if constexpr (M > 1) any_gradient_tile<M - 1>(m, g, x, rows, out, there, add);
}

// Floats that `weight_gradient` needs.
static int64_t gradient_room(int64_t rows, int64_t inputs, int64_t threads) {
    return tiles() ? threads * tiles_room(inputs, rows) : std::min(rows, CHAINED) * ((inputs + BLOCK - 1) / BLOCK * BLOCK);
}

// For all threads of a team together. gradient: rows of `outputs` numbers; out: rows of `inputs` numbers.
static void weight_gradient(Rows gradient, Rows x, int64_t rows, int64_t outputs, int64_t inputs, Rows out, bool add,
                            float* room, Team team) {
#ifdef ESRL_TILES
    if (tiles()) return multiply_in_tiles({gradient, false}, {x, false}, outputs, rows, inputs, {out, add}, room, team);
#endif
    const int64_t blocks = (inputs + BLOCK - 1) / BLOCK, tiles = (outputs + TILE - 1) / TILE;
    // equal shares; many threads divide the inputs, too
    const int64_t groups = std::min(tiles, (tiles + HELD * team.size - 1) / (HELD * team.size) * team.size);
    const int64_t across = std::min(blocks, (team.size + groups - 1) / groups);
    const int64_t parts = (rows + CHAINED - 1) / CHAINED;
    alignas(64) float held[HELD * TILE * CHAINED];
    for (int64_t part = 0; part < parts; part++) {
        const int64_t first = rows * part / parts, count = rows * (part + 1) / parts - first;
        for (int64_t r = team.begin(count); r < team.end(count); r++) {
            const float* from = x.row(first + r);
            for (int64_t b = 0; b < blocks; b++) {
                float* to = room + (b * count + r) * BLOCK;
                const int64_t there = std::min<int64_t>(BLOCK, inputs - b * BLOCK);
                for (int64_t j = 0; j < there; j++) to[j] = from[b * BLOCK + j];
                for (int64_t j = there; j < BLOCK; j++) to[j] = 0;
            }
        }
#pragma omp barrier
        for (int64_t task = team.begin(groups * across); task < team.end(groups * across); task++) {
            const int64_t group = task / across, piece = task % across;
            const int64_t from = tiles * group / groups, to = tiles * (group + 1) / groups;
            const int64_t start = outputs * from / tiles;
            for (int64_t r = 0; r < count; r++)
                for (int64_t i = from; i < to; i++) {
                    const int64_t begin = outputs * i / tiles, width = outputs * (i + 1) / tiles - begin;
                    float* at = held + (begin - start) * count + r * width;
                    for (int64_t j = 0; j < width; j++) at[j] = gradient.row(first + r)[begin + j];
                }
            for (int64_t b = blocks * piece / across; b < blocks * (piece + 1) / across; b++)
                for (int64_t i = from; i < to; i++) {
                    const int64_t begin = outputs * i / tiles, end = outputs * (i + 1) / tiles;
                    const int64_t there = std::min<int64_t>(BLOCK, inputs - b * BLOCK);
                    any_gradient_tile<TILE>(end - begin, held + (begin - start) * count, room + b * count * BLOCK, count,
                                            {out.row(begin) + b * BLOCK, out.stride}, there, add || part);
                }
        }
#pragma omp barrier
    }
}

}  // namespace esrl
