// A token for every row from its logits, by inverting the cumulative distribution (method.md, section 4, "Draws").
#pragma once
#include <vector>

#include "attention.h"

namespace esrl {

struct Drawn {
    int64_t* tokens;
    float *log_probs, *sampling_log_probs;  // at temperature 1; at the row's own, 0 for a greedy one
    float *entropy, *max_prob;              // or null
};

constexpr int SUMMED = 128;  // tokens whose weights are summed before the search; a whole number of vectors

// exp((logits - top) / tau) of a vector; what lies behind the vocabulary is minus infinity.
static inline vec weight_of(vec shifted, float tau) { return exp_negative(tau == 1 ? shifted : shifted / tau); }

// Logits of one row, filled up with minus infinity to whole blocks of SUMMED; `sums`: room for a number per block.
static void draw_row(const float* logits, int64_t filled, float tau, double uniform, double* sums, Drawn drawn,
                     int64_t row) {
    vec most = all(NEVER);
    for (int64_t i = 0; i < filled; i += W) most = larger(most, load(logits + i));
    const float top = largest(most);
    const bool entropy = drawn.entropy != nullptr, greedy = tau == 0, plain = tau == 1 || greedy;
    double norm = 0, whole = 0, surprise = 0;
    const int64_t blocks = filled / SUMMED;
    for (int64_t b = 0; b < blocks; b++) {
        vec sum = {}, own = {}, log = {};
        for (int64_t i = b * SUMMED; i < (b + 1) * SUMMED; i += W) {
            const vec shifted = load(logits + i) - top, weight = exp_negative(shifted);
            sum += weight;
            if (!plain) own += weight_of(shifted, tau);
            if (entropy) log += weight * larger(shifted, all(-88.0f));
        }
        norm += total(sum);
        surprise += total(log);
        whole = sums[b] = whole + (plain ? total(sum) : total(own));
    }
    const double log_norm = std::log(norm);
    int64_t token = -1;
    if (greedy) {
        for (int64_t i = 0; i < filled && token < 0 && top > NEVER; i++)
            if (logits[i] == top) token = i;
    } else {
        const double target = uniform * whole;  // below `whole`: a uniform number is 1 - 2^-53 at most
        int64_t b = 0;
        while (b < blocks - 1 && sums[b] <= target) b++;
        double reached = b ? sums[b - 1] : 0;
        float weights[SUMMED];
        for (int64_t i = 0; i < SUMMED; i += W)
            store(weights + i, weight_of(load(logits + b * SUMMED + i) - top, tau));
        for (int64_t i = 0; i < SUMMED; i++) {
            if (!(weights[i] > 0)) continue;  // one that cannot be drawn
            token = b * SUMMED + i;
            reached += weights[i];
            if (reached > target) break;
        }
    }
    token = token < 0 ? 0 : token;  // logits that are not a number: the log-probability says so
    const double shifted = double(logits[token]) - top;
    drawn.tokens[row] = token;
    drawn.log_probs[row] = float(shifted - log_norm);
    drawn.sampling_log_probs[row] = greedy ? 0 : float(shifted / tau - std::log(whole));
    if (entropy) drawn.entropy[row] = float(log_norm - surprise / norm);
    if (drawn.max_prob) drawn.max_prob[row] = float(1 / norm);
}

// Rows of states -> logits, `together` rows at a time in `room` -> tokens. All threads of a team call it. `after` is read
// next, or null.
static void draw(const Linear& projection, Rows states, int64_t rows, const double* tau, const double* uniforms,
                 int64_t together, float* room, Drawn drawn, const Linear* after = nullptr) {
    const int64_t filled = (projection.outputs + SUMMED - 1) / SUMMED * SUMMED;
    const Rows logits{room, filled + W};
    std::vector<double> sums(filled / SUMMED);
    for (int64_t begin = 0; begin < rows; begin += together) {
        const int64_t here = std::min(together, rows - begin);
        linear(projection, {states.row(begin), states.stride}, here, logits, nullptr, Team(),
               begin + here < rows ? &projection : after);
#pragma omp barrier
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < here; i++) {
            for (int64_t j = projection.outputs; j < filled; j++) logits.row(i)[j] = NEVER;
            draw_row(logits.row(i), filled, float(tau[begin + i]), uniforms[begin + i], sums.data(), drawn, begin + i);
        }
    }
}

}  // namespace esrl
