// The interface of the compiled kernels: plain C, called from Python through ctypes (native.py says what is passed).
#include "decode.h"
#include "encoder.h"
#include "gradient.h"
#include "pool.h"
#include "product.h"
#include "rouge.h"
#include "training_attention.h"

using namespace esrl;

extern "C" {

int64_t esrl_vector() { return W; }
int64_t esrl_block() { return BLOCK; }
int64_t esrl_operations() { return operations; }

// The pool's memory (pool.h): from here on, until it is left as often, this thread is in a stage.
void esrl_enter() { Pool::stages++; }
void esrl_leave() { Pool::stages--; }
void* esrl_take(size_t bytes) { return Pool::the().take(bytes); }
bool esrl_give(void* memory) { return Pool::the().give(memory); }
void esrl_release() { Pool::the().release(); }

void esrl_lay_out(float* weight, int64_t outputs, int64_t inputs, float* to, int64_t threads) {
#pragma omp parallel num_threads(threads)
    lay_out({weight, inputs}, outputs, inputs, to, Team());
}

// From now on there are products in tiles, or not; gives whether there are, since not all processors have some. A layer
// stays what it is.
int64_t esrl_use_tiles(int64_t use) {
    static const bool there = tiles();
    return tiles() = there && use;
}

// Floats of the room that a product needs, and a weight's gradient.
int64_t esrl_product_room(int64_t inputs, int64_t outputs, int64_t threads) { return threads * tiles_room(outputs, inputs); }
int64_t esrl_gradient_room(int64_t rows, int64_t inputs, int64_t threads) { return gradient_room(rows, inputs, threads); }

void esrl_linear(const Linear* l, float* x, int64_t x_stride, int64_t rows, float* residual, float* room, float* out,
                 int64_t threads) {
    const Rows to{out, l->outputs}, add{residual, l->outputs};
    count(*l, rows);
#pragma omp parallel num_threads(threads)
    linear(*l, {x, x_stride}, rows, to, residual ? &add : nullptr, Team(), nullptr, room);
}

void esrl_draw(const Linear* projection, float* states, int64_t stride, int64_t rows, const double* tau,
               const double* uniforms, int64_t together, float* room, const Drawn* drawn, int64_t threads) {
    count(*projection, rows);
#pragma omp parallel num_threads(threads)
    draw(*projection, {states, stride}, rows, tau, uniforms, together, room, *drawn);
}

// The weight as it is, (outputs, inputs) or, transposed, (inputs, outputs); out: (rows, outputs), contiguous.
void esrl_product(float* weight, int64_t weight_stride, int64_t transposed, const float* bias, float* x, int64_t x_stride,
                  int64_t rows, int64_t inputs, int64_t outputs, float* room, float* out, int64_t threads) {
    operations += 2 * rows * outputs * inputs;
#pragma omp parallel num_threads(threads)
    product({weight, weight_stride}, transposed, bias, {x, x_stride}, rows, inputs, outputs, {out, outputs}, room,
            Team());
}

// (rows, outputs) and (rows, inputs) -> (outputs, inputs), contiguous.
void esrl_weight_gradient(float* gradient, int64_t gradient_stride, float* x, int64_t x_stride, int64_t rows, int64_t outputs,
                          int64_t inputs, float* room, float* out, int64_t add, int64_t threads) {
    operations += 2 * rows * outputs * inputs;
#pragma omp parallel num_threads(threads)
    weight_gradient({gradient, gradient_stride}, {x, x_stride}, rows, outputs, inputs, {out, inputs}, add, room, Team());
}

int64_t esrl_room(int64_t outputs) { return (outputs + SUMMED - 1) / SUMMED * SUMMED + W; }

Decoder* esrl_decoder(const Marian* model, int64_t threads) {
    return new (std::nothrow) Decoder{model, threads, {}, {}, {}, {}, {}};
}

void esrl_free(Decoder* decoder) { delete decoder; }

// Rows that begin, behind those that are there. 0: no memory.
int64_t esrl_join(Decoder* decoder, const Prompts* prompts, const int64_t* prompt, int64_t rows) try {
    for (int64_t r = 0; r < rows; r++) decoder->rows.push_back({prompts, prompt[r], 0, {}});
    decoder->arrange();
    return 1;
} catch (const std::bad_alloc&) {
    return 0;
}

// Go on with these rows, in this order; each at most once.
int64_t esrl_keep(Decoder* decoder, const int64_t* kept, int64_t rows) try {
    decoder->keep(kept, rows);
    return 1;
} catch (const std::bad_alloc&) {
    return 0;
}

// Last tokens -> (rows, width) states for the next ones, `stride` numbers apart. 0: no memory.
int64_t esrl_step(Decoder* decoder, const int64_t* tokens, float* out, int64_t stride) try {
    step(*decoder, tokens, {out, stride});
    return 1;
} catch (const std::bad_alloc&) {
    return 0;
}

// At most so many steps of whole samples. 1: there is nothing left to do, 0: there is, -1: no memory.
int64_t esrl_sample(Decoder* decoder, const Linear* projection, Sampling* sampling, int64_t steps) try {
    return sample(*decoder, *projection, *sampling, steps);
} catch (const std::bad_alloc&) {
    return -1;
}

// Numbers of the room that `esrl_encode` needs.
int64_t esrl_encode_room(const Encoder* encoder, const Sources* sources, int64_t threads) {
    int64_t most = ENCODED;
    for (int64_t p = 0; p < sources->prompts; p++) most = std::max(most, sources->starts[p + 1] - sources->starts[p]);
    const int64_t rows = std::min(most, sources->starts[sources->prompts]);
    return rows * (5 * encoder->width + encoder->inner + 4 * W) +
           threads * tiles_room(std::max(encoder->width, encoder->inner), std::max(encoder->width, encoder->inner));
}

// Prompts -> keys and values (P, H, S, d) for each reader, at the places of real tokens. 0: no memory.
int64_t esrl_encode(const Encoder* encoder, const Sources* sources, float* room, float* const* keys, float* const* values,
                    int64_t threads) try {
    const int64_t width = encoder->width, prompts = sources->prompts, *starts = sources->starts;
    for (int64_t first = 0, last; first < prompts; first = last) {
        for (last = first + 1; last < prompts && starts[last + 1] - starts[first] <= ENCODED;) last++;
        const int64_t rows = starts[last] - starts[first];
#pragma omp parallel num_threads(threads)
        encode(*encoder, *sources, first, last, room, keys, values);
        for (int64_t l = 0; l < encoder->num_layers; l++) {
            const EncoderLayer& layer = encoder->layers[l];
            for (const Linear* each : {&layer.query, &layer.key, &layer.value, &layer.mixed, &layer.inner, &layer.outer})
                count(*each, rows);
        }
        for (int64_t l = 0; l < encoder->num_readers; l++) count(encoder->keys[l], rows), count(encoder->values[l], rows);
        for (int64_t p = first; p < last; p++)
            operations += 4 * encoder->num_layers * width * (starts[p + 1] - starts[p]) * (starts[p + 1] - starts[p]);
    }
    return 1;
} catch (const std::bad_alloc&) {
    return 0;
}

// Attention with a gradient, or the way back. 0: no memory.
int64_t esrl_attention(const Attention* a, int64_t width, int64_t back, int64_t threads) try {
    operations += attention_operations(*a, width, back);
    with_vectors(width / W, [&](auto vectors) {
#pragma omp parallel num_threads(threads)
        attention<decltype(vectors)::value>(*a, back);
    });
    return 1;
} catch (const std::bad_alloc&) {
    return 0;
}

// Pairs of texts, each followed by a 0 -> their F-measures. 0: no memory.
int64_t esrl_rouge_l(const char* completions, const char* references, int64_t pairs, double* scores) try {
    rouge_l(completions, references, pairs, scores);
    return 1;
} catch (const std::bad_alloc&) {
    return 0;
}

}  // extern "C"
