// Stage one's loop: a token for every row, rows that end leave, others take their places.
//
// Its slow twin is sampling/decoding.py, which leaves to Python what comes between the steps: a tenth of the time, since
// kernels leave nothing of Python in the caches.
#pragma once
#include "draw.h"
#include "marian.h"

namespace esrl {

// Rows to be sampled, and where what they draw goes: (rows, steps) each, zeros at first; the last two may be null.
struct Sampling {
    const Prompts* prompts;
    const int64_t *prompt, *starts, *limits;  // (rows,): each row's prompt, first input, longest sample
    const double *temperatures, *uniforms;    // (rows,); (steps, rows), or null where nothing is drawn
    const int64_t* eos;
    int64_t num_eos, rows, steps;
    int64_t places;    // rows at a time
    int64_t together;  // rows whose logits exist at a time
    float* logits;     // room for them
    int64_t* tokens;
    uint8_t *mask, *ended;  // tokens that are there; those that end a sample by themselves
    float *log_probs, *sampling_log_probs, *entropy, *max_prob;
    int64_t begun;  // rows that have begun
};

// What a step works with, row by row in the batch.
struct Numbers {
    std::vector<int64_t> tokens;
    std::vector<double> temperatures, uniforms;
    std::vector<float> states, log_probs, sampling_log_probs, entropy, max_prob;
    explicit Numbers(int64_t rows, int64_t stride)
        : tokens(rows), temperatures(rows), uniforms(rows), states(rows * stride), log_probs(rows),
          sampling_log_probs(rows), entropy(rows), max_prob(rows) {}
};

// Rows take the places that are free.
static void begin(Decoder& decoder, Sampling& s) {
    const int64_t size = std::min<int64_t>(s.places - decoder.rows.size(), s.rows - s.begun);
    for (int64_t i = 0; i < size; i++, s.begun++)
        decoder.rows.push_back({s.prompts, s.prompt[s.begun], 0, {}, s.begun});
    if (size > 0) decoder.arrange();
}

// What the rows' next token follows from.
static void gather(const Decoder& decoder, const Sampling& s, Numbers& n) {
    for (size_t r = 0; r < decoder.rows.size(); r++) {
        const Row& row = decoder.rows[r];
        n.tokens[r] = row.position ? s.tokens[row.id * s.steps + row.position - 1] : s.starts[row.id];
        n.temperatures[r] = s.temperatures[row.id];
        n.uniforms[r] = s.uniforms ? s.uniforms[row.position * s.rows + row.id] : 0;
    }
}

// What the rows have drawn goes to its place; those that it ends leave.
static void scatter(Decoder& decoder, const Sampling& s, const Numbers& n) {
    std::vector<int64_t> kept;
    for (size_t r = 0; r < decoder.rows.size(); r++) {
        const Row& row = decoder.rows[r];
        const int64_t place = row.id * s.steps + row.position - 1;
        s.tokens[place] = n.tokens[r];
        s.mask[place] = 1;
        s.log_probs[place] = n.log_probs[r];
        s.sampling_log_probs[place] = n.sampling_log_probs[r];
        if (s.entropy) s.entropy[place] = n.entropy[r];
        if (s.max_prob) s.max_prob[place] = n.max_prob[r];
        s.ended[place] = std::find(s.eos, s.eos + s.num_eos, n.tokens[r]) != s.eos + s.num_eos;
        if (!s.ended[place] && row.position < s.limits[row.id]) kept.push_back(r);
    }
    if (kept.size() < decoder.rows.size()) decoder.keep(kept.data(), kept.size());
}

// At most so many steps; whether there is nothing left to do.
static bool sample(Decoder& decoder, const Linear& projection, Sampling& s, int64_t steps) {
    const int64_t stride = decoder.model->width + W;  // not a power of two: rows would share a few places in the cache
    Numbers n(s.places, stride);
    const Rows states{n.states.data(), stride};
    const Drawn drawn{n.tokens.data(), n.log_probs.data(), n.sampling_log_probs.data(), s.entropy ? n.entropy.data() : nullptr,
                      s.max_prob ? n.max_prob.data() : nullptr};
    for (int64_t i = 0; i < steps; i++) {
        begin(decoder, s);
        const int64_t rows = decoder.rows.size();
        if (!rows) return true;
        gather(decoder, s, n);
        step(decoder, n.tokens.data(), states, &projection);
        count(projection, rows);
#pragma omp parallel num_threads(decoder.threads)
        draw(projection, states, rows, n.temperatures.data(), n.uniforms.data(), s.together, s.logits, drawn,
             &decoder.model->layers[0].query);
        scatter(decoder, s, n);
    }
    return decoder.rows.empty() && s.begun == s.rows;
}

}  // namespace esrl
