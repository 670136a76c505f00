// Products in float32 on a matrix unit for bfloat16 (AMX, in Intel's processors since 2023).
//
// A number in float32 is the sum of three in bfloat16, 8 bits each: its "thirds". Of the nine products of two such sums
// three are left out: they are below 2^-25 of the whole, less than a product in float32 is rounded by. A tile multiplies
// 16 rows with 16 columns, 32 numbers deep, and adds up in float32; six of them take less time than vectors do.
// Each sum is taken in the same order however many rows there are: results do not depend on the batch. A number that is
// not finite makes what it is part of not a number.
#pragma once
#include "rows.h"

#if defined(__AMX_BF16__) && defined(__AVX512F__) && defined(__linux__)
#define ESRL_TILES
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace esrl {

constexpr int64_t SIDE = 16;              // rows, or columns, of a tile
constexpr int64_t DEEP = 32;              // numbers of each that are multiplied
constexpr int64_t THIRD = SIDE * DEEP;    // numbers of a tile
constexpr int64_t THIRDS = 3 * THIRD;
constexpr int64_t PAIR = 2 * SIDE;        // rows, and columns, multiplied at a time: two tiles of each
constexpr int64_t MOST = 12 * PAIR;       // columns that a thread holds, ...
constexpr int64_t MOST_DEEP = 16 * DEEP;  // ... and numbers of each: their thirds stay near

// Whether tiles are used: where the processor has them and the system lets a process use them.
static bool& tiles() {
#ifdef ESRL_TILES
    constexpr long ask = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM
    static bool used = !syscall(SYS_arch_prctl, ask, tile_data);
#else
    static bool used = false;
#endif
    return used;
}

// A factor: the numbers of a row, or column, lie side by side (`along`) or one below the other.
struct Factor {
    Rows rows;
    bool along;
};

// Where a product goes: activation(sums + bias) [+ residual]. `residual` may be where the sums go if there is no activation.
struct Result {
    Rows rows;
    bool add = false;  // to what is there
    const float* bias = nullptr;
    const Rows* residual = nullptr;
    int64_t activation = NONE;
};

// Floats of the room in which a thread holds columns of `deep` numbers.
static int64_t tiles_room(int64_t columns, int64_t deep) {
#ifdef ESRL_TILES
    return std::min((columns + PAIR - 1) / PAIR * PAIR, MOST) * std::min((deep + DEEP - 1) / DEEP * DEEP, MOST_DEEP) * 3 / 2 +
           LINE;
#else
    return 0 * columns * deep;
#endif
}

#ifdef ESRL_TILES

static_assert(W == SIDE && BLOCK == PAIR);

typedef uint32_t words __attribute__((vector_size(W * 4)));

// Two vectors -> their thirds, in pairs: number i of `low` beside number i of `high`.
static inline void take_apart(vec low, vec high, uint16_t* to) {
    for (int third = 0; third < 3; third++, to += THIRD) {
        words a = (words)low, b = (words)high;
        if (third < 2) a += 1 << 15, b += 1 << 15;  // rounded; the last one is exact
        a &= 0xffff0000u, b &= 0xffff0000u;
        *reinterpret_cast<words*>(to) = a >> 16 | b;
        low -= (vec)a, high -= (vec)b;
    }
}

// A vector of which `there` numbers are there; the others are 0.
static inline vec load_some(const float* at, int64_t there) {
    if (there >= W) return load(at);
    float numbers[W] = {};
    for (int64_t i = 0; i < there; i++) numbers[i] = at[i];
    return load(numbers);
}

static inline void store_some(float* at, vec value, int64_t there) {
    if (there >= W) return store(at, value);
    for (int64_t i = 0; i < there; i++) at[i] = value[i];
}

// The thirds of a tile; what is not there is 0. A tile of the first factor has a row's numbers (k0 k16 k1 k17 ...) in a
// row, one of the second has two of each column's side by side: (k0 k16) of all columns, then (k1 k17), and so on. So a
// first factor that lies along is taken like a second one that does not, and the other two are transposed.
template <bool ALONG, bool TRANSPOSED, class Load>
static inline void take_tile(Rows from, Load get, uint16_t* to) {
    vec low[W], high[W];
#pragma GCC unroll 16
    for (int j = 0; j < W; j++) low[j] = get(from.row(j), j, 0);
    if (TRANSPOSED) transpose(low);
#pragma GCC unroll 16
    for (int j = 0; j < W; j++) high[j] = ALONG ? get(from.row(j) + W, j, W) : get(from.row(j + W), j + W, 0);
    if (TRANSPOSED) transpose(high);
#pragma GCC unroll 16
    for (int j = 0; j < W; j++) take_apart(low[j], high[j], to + j * DEEP);
}

// `count` rows, or columns, from `begin` on, of their numbers DEEP from `from` on, up to `until` -> a tile's thirds.
template <bool ALONG, bool TRANSPOSED>
static void take(Rows m, int64_t begin, int64_t count, int64_t from, int64_t until, uint16_t* to) {
    const Rows at{ALONG ? m.row(begin) + from : m.row(from) + begin, m.stride};
    if (count >= SIDE && until - from >= DEEP)
        return take_tile<ALONG, TRANSPOSED>(at, [](const float* at, int64_t, int64_t) { return load(at); }, to);
    const int64_t rows = ALONG ? count : until - from, numbers = ALONG ? until - from : count;
    const auto part = [&](const float* at, int64_t row, int64_t number) {
        return row < rows ? load_some(at, numbers - number) : vec{};
    };
    take_tile<ALONG, TRANSPOSED>(at, part, to);
}

// What a thread has near it: the thirds of a pair of tiles, and the sums of all that it goes past.
struct Near {
    alignas(64) uint16_t thirds[2 * THIRDS * (MOST_DEEP / DEEP)];
    alignas(64) float sums[PAIR * MOST];
};

static Near& near() {
    static thread_local Near own;
    return own;
}

// Tiles 0 and 1 are sums of the first rows, 2 and 3 of the second ones; 4 and 5 rows, 6 and 7 columns.
static inline void configure(int64_t rows) {
    struct alignas(64) {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {};
        uint8_t rows[16] = {};
    } form;
    for (int i = 0; i < 8; i++) form.bytes[i] = DEEP * 2, form.rows[i] = SIDE;
    form.rows[0] = form.rows[1] = form.rows[4] = std::min(SIDE, rows);
    form.rows[2] = form.rows[3] = form.rows[5] = std::max<int64_t>(1, rows - SIDE);
    __asm__ volatile("" ::"r"(&form) : "memory");  // compilers do not know that all of it is read
    _tile_loadconfig(&form);
}

#define ESRL_ROWS(third)                          \
    _tile_loadd(4, a + (third) * THIRD, DEEP * 2); \
    if (R == 2) _tile_loadd(5, a + apart + (third) * THIRD, DEEP * 2);
#define ESRL_COLUMNS(third)                       \
    _tile_loadd(6, b + (third) * THIRD, DEEP * 2); \
    _tile_loadd(7, b + THIRDS + (third) * THIRD, DEEP * 2);
#define ESRL_MULTIPLY                    \
    _tile_dpbf16ps(0, 4, 6);             \
    _tile_dpbf16ps(1, 4, 7);             \
    if (R == 2) _tile_dpbf16ps(2, 5, 6); \
    if (R == 2) _tile_dpbf16ps(3, 5, 7);

// R tiles of rows, `apart` numbers apart, times two tiles of columns, `count` of each: sums, (R * SIDE, PAIR).
template <int R>
static inline void multiply(const uint16_t* a, int64_t apart, const uint16_t* b, int64_t count, float* sums) {
    constexpr int64_t next = SIDE * PAIR, bytes = PAIR * 4;
    __asm__ volatile("" ::: "memory");  // compilers do not know what is read
    _tile_zero(0);
    _tile_zero(1);
    if (R == 2) _tile_zero(2);
    if (R == 2) _tile_zero(3);
    for (int64_t i = 0; i < count; i++, a += THIRDS, b += 2 * THIRDS) {
        ESRL_COLUMNS(2) ESRL_ROWS(0) ESRL_MULTIPLY
        ESRL_COLUMNS(1) ESRL_MULTIPLY
        ESRL_ROWS(1) ESRL_MULTIPLY
        ESRL_COLUMNS(0) ESRL_MULTIPLY
        ESRL_ROWS(0) ESRL_MULTIPLY
        ESRL_ROWS(2) ESRL_MULTIPLY
    }
    _tile_stored(0, sums, bytes);
    _tile_stored(1, sums + SIDE, bytes);
    if (R == 2) _tile_stored(2, sums + next, bytes);
    if (R == 2) _tile_stored(3, sums + next + SIDE, bytes);
}

#undef ESRL_ROWS
#undef ESRL_COLUMNS
#undef ESRL_MULTIPLY

// Sums of a row, PAIR columns after the other, those of the next ones PAIR * PAIR numbers behind, -> the result; of the
// first numbers, the last ones, or both.
static inline void put(const Result& to, const float* sums, int64_t row, int64_t column, int64_t end, bool first, bool last) {
    for (int64_t at = 0; column < end; column += W, at ^= W) {
        float* out = to.rows.row(row) + column;
        const int64_t there = end - column;
        vec value = load(sums + at);
        const auto residual = [&] { return load_some(to.residual->row(row) + column, there); };
        if (to.add || !first) value += load_some(out, there);
        if (first && to.bias) value += load_some(to.bias + column, there);
        if (first && to.residual && to.activation == NONE) value += residual();
        if (last && to.activation != NONE) {
            value = activate(value, to.activation);
            if (to.residual) value += residual();
        }
        store_some(out, value, there);
        if (at) sums += PAIR * PAIR;
    }
}

// One side of a product: `count` rows or columns (COLUMNS) of `deep` numbers.
template <bool COLUMNS>
struct Side {
    Factor factor;
    int64_t count;

    // Their thirds, `some` of them from `begin` on, whole pairs or the last ones, numbers `from` ... `until`: (tiles, deep),
    // of columns (pairs of tiles, deep, 2). In the order of the memory; what comes next is fetched meanwhile, since
    // processors do not foresee so many rows.
    void take(int64_t begin, int64_t some, int64_t from, int64_t until, uint16_t* to) const {
        const int64_t steps = (until - from + DEEP - 1) / DEEP, tiles = (some + SIDE - 1) / SIDE;
        const int64_t filled = COLUMNS ? (tiles + 1) / 2 * 2 : tiles;
        const Rows& m = factor.rows;
        const auto take_one = [&](int64_t tile, int64_t step) {
            const int64_t place = COLUMNS ? (tile / 2 * steps + step) * 2 + tile % 2 : tile * steps + step;
            (factor.along ? esrl::take<true, COLUMNS> : esrl::take<false, !COLUMNS>)(
                m, begin + tile * SIDE, count - begin - tile * SIDE, from + step * DEEP, until, to + place * THIRDS);
        };
        if (factor.along) {
            for (int64_t tile = 0; tile < filled; tile++)
                for (int64_t step = 0; step < steps; step++) {
                    const int64_t next = begin + (tile + 1) * SIDE;
                    for (int64_t j = SIDE * step / steps; j < SIDE * (step + 1) / steps && next + j < begin + some; j++)
                        fetch(m.row(next + j) + from, until - from);
                    take_one(tile, step);
                }
        } else {
            for (int64_t step = 0; step < steps; step++)
                for (int64_t tile = 0; tile < filled; tile++) {
                    const int64_t next = from + (step + 1) * DEEP;
                    for (int64_t j = DEEP * tile / filled; j < DEEP * (tile + 1) / filled && next + j < until; j++)
                        fetch(m.row(next + j) + begin, some);
                    take_one(tile, step);
                }
        }
    }
};

// Rows times columns of `deep` numbers each, for all threads of a team: each holds the thirds of some columns and has some
// rows go past them. `room` has tiles_room(columns, deep) floats for each.
static void multiply_in_tiles(const Factor& first, const Factor& second, int64_t rows, int64_t deep, int64_t columns,
                              const Result& to, float* room, Team team) {
    const Side<true> held{second, columns};
    const Side<false> passing{first, rows};
    const int64_t steps = (deep + DEEP - 1) / DEEP, panels = (deep + MOST_DEEP - 1) / MOST_DEEP;
    const int64_t pairs = (rows + PAIR - 1) / PAIR, pairs_held = (columns + PAIR - 1) / PAIR;
    // groups of threads divide the columns, the threads of a group the rows: so that each takes the least apart
    int64_t groups = 1;
    const auto apart = [&](int64_t groups) { return double(pairs_held) / groups + double(pairs) * groups / team.size; };
    while (groups < std::min(team.size, pairs_held) && apart(groups + 1) < apart(groups)) groups++;
    const int64_t group = team.index * groups / team.size, leader = (group * team.size + groups - 1) / groups;
    const Team mates{team.index - leader, ((group + 1) * team.size + groups - 1) / groups - leader};
    const int64_t first_pair = pairs_held * group / groups, here = pairs_held * (group + 1) / groups - first_pair;
    const int64_t parts = (here * PAIR + MOST - 1) / MOST, begin = mates.begin(pairs) * PAIR;
    const int64_t end = std::min(rows, mates.end(pairs) * PAIR);
    if (begin >= end) return;
    room += team.index * tiles_room(columns, deep);
    uint16_t* taken = reinterpret_cast<uint16_t*>((reinterpret_cast<uintptr_t>(room) + 63) / 64 * 64);
    Near& own = near();
    int64_t configured = 0;
    for (int64_t part = 0; part < parts * panels; part++) {
        const int64_t left = (first_pair + here * (part / panels) / parts) * PAIR;
        const int64_t right = std::min(columns, (first_pair + here * (part / panels + 1) / parts) * PAIR);
        const int64_t panel = part % panels, from = steps * panel / panels * DEEP;
        const int64_t until = std::min(deep, steps * (panel + 1) / panels * DEEP), count = (until - from + DEEP - 1) / DEEP;
        held.take(left, right - left, from, until, taken);
        for (int64_t row = begin; row < end; row += PAIR) {
            const int64_t some = std::min(PAIR, end - row);
            if (some != configured) configure(configured = some);
            passing.take(row, some, from, until, own.thirds);
            for (int64_t column = left; column < right; column += PAIR) {
                const uint16_t* b = taken + (column - left) / SIDE * count * THIRDS;
                float* sums = own.sums + (column - left) * PAIR;
                for (int64_t j = 0; j < some; j++) fetch(to.rows.row(row + j) + column, std::min(PAIR, right - column));
                some > SIDE ? multiply<2>(own.thirds, count * THIRDS, b, count, sums)
                            : multiply<1>(own.thirds, 0, b, count, sums);
            }
            for (int64_t i = 0; i < some; i++)
                put(to, own.sums + i * PAIR, row + i, left, right, !from, until == deep);
        }
    }
    if (configured) _tile_release();
}

#endif

}  // namespace esrl
