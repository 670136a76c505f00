// Matrix products with weights as they are, for both directions through a linear layer that learns.
//
// A thread lays out a block of outputs, PANEL inputs at a time, right before it is used: with a hundred rows and more
// that is little work, and the weight needs no second place.
#pragma once

#include "linear.h"

namespace esrl {

constexpr int64_t PANEL = 512;  // inputs laid out at a time: with a block's outputs they stay near

// (inputs, there) of a weight's transpose -> (inputs, BLOCK).
static void lay_out_columns(Rows weight, int64_t there, int64_t inputs, float* to) {
    for (int64_t i = 0; i < inputs; i++, to += BLOCK) {
        const float* from = weight.row(i);
        if (there == BLOCK) {
            for (int n = 0; n < WIDE; n++) store(to + n * W, load(from + n * W));
        } else {
            for (int64_t j = 0; j < BLOCK; j++) to[j] = j < there ? from[j] : 0;
        }
    }
}

// out = x weight' (+ bias), or x weight where it is `transposed`. For all threads of a team together. Nothing may be where
// out is. `room` is for tiles.
static void product(Rows weight, bool transposed, const float* bias, Rows x, int64_t rows, int64_t inputs, int64_t outputs,
                    Rows out, float* room, Team team) {
#ifdef ESRL_TILES
    if (tiles())
        return multiply_in_tiles({x, true}, {weight, !transposed}, rows, inputs, outputs, {out, false, bias}, room, team);
#endif
    (void)room;
    const int64_t blocks = (outputs + BLOCK - 1) / BLOCK, tiles = (rows + TILE - 1) / TILE;
    const int64_t parts = (inputs + PANEL - 1) / PANEL;
    const int64_t groups = std::min(tiles, std::max<int64_t>(1, team.size / blocks));
    alignas(64) float near[PANEL * BLOCK], biases[BLOCK];
    for (int64_t part = 0; part < parts; part++) {
        const int64_t first = inputs * part / parts, count = inputs * (part + 1) / parts - first;
        for (int64_t task = team.begin(blocks * groups); task < team.end(blocks * groups); task++) {
            const int64_t column = task / groups * BLOCK, group = task % groups;
            const int64_t there = std::min<int64_t>(BLOCK, outputs - column);
            if (transposed)
                lay_out_columns({weight.row(first) + column, weight.stride}, there, count, near);
            else
                lay_out_rows({weight.row(column) + first, weight.stride}, there, count, near);
            const bool with_bias = bias && !part;
            if (with_bias)
                for (int64_t j = 0; j < BLOCK; j++) biases[j] = j < there ? bias[column + j] : 0;
            const Block block{near, with_bias ? biases : nullptr, count, there, NONE};
            for (int64_t i = tiles * group / groups; i < tiles * (group + 1) / groups; i++) {
                const int64_t begin = rows * i / tiles, end = rows * (i + 1) / tiles;
                const Rows to{out.row(begin) + column, out.stride};
                any_tile<TILE>(end - begin, block, {x.row(begin) + first, x.stride}, to, part ? to.at : nullptr, to.stride);
            }
        }
    }
}

}  // namespace esrl
