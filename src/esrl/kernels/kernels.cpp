// The interface of the compiled kernels: plain C, called from Python through ctypes (native.py says what is passed).
#include <atomic>

#include "draw.h"
#include "encoder.h"
#include "gradient.h"
#include "memory.h"
#include "product.h"
#include "rouge.h"
#include "training_attention.h"

using namespace esrl;

// Multiplications and additions of matrix products and attention so far: PyTorch's counter does not see them.
static std::atomic<int64_t> operations{0};

static void count(const Linear& l, int64_t rows) { operations += 2 * rows * l.inputs * l.outputs; }

// f(V), V a constant: the vectors of a head.
template <class F>
static void with_vectors(int64_t count, F f) {
    if (count == 1) f(std::integral_constant<int, 1>());
    if (count == 2) f(std::integral_constant<int, 2>());
    if (count == 4) f(std::integral_constant<int, 4>());
    if (count == 8) f(std::integral_constant<int, 8>());
    if (count == 16) f(std::integral_constant<int, 16>());
}

extern "C" {

int64_t esrl_vector() { return W; }
int64_t esrl_block() { return BLOCK; }
int64_t esrl_operations() { return operations; }

// Memory for so many numbers, whatever they are, in huge pages. Null: there is none.
Large* esrl_large(int64_t count) try { return new Large(count); } catch (const std::bad_alloc&) { return nullptr; }
float* esrl_large_data(const Large* large) { return large->data(); }
void esrl_large_free(Large* large) { delete large; }
// Whether there was anything.
int64_t esrl_release() { return kept().release(); }

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

// large: much is decoded at a time, and memory is to be in huge pages.
Decoder* esrl_decoder(const Marian* model, int64_t threads, int64_t large) {
    return new (std::nothrow) Decoder{model, threads, {}, {}, {}, bool(large), {}, {}, {}};
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
    std::vector<Row> next;
    next.reserve(rows);
    for (int64_t r = 0; r < rows; r++) next.push_back(std::move(decoder->rows[kept[r]]));
    for (Row& row : decoder->rows)
        decoder->free_pages.insert(decoder->free_pages.end(), row.pages.begin(), row.pages.end());
    decoder->rows = std::move(next);
    decoder->arrange();
    return 1;
} catch (const std::bad_alloc&) {
    return 0;
}

// Last tokens -> (rows, width) states for the next ones, `stride` numbers apart. 0: no memory.
int64_t esrl_step(Decoder* decoder, const int64_t* tokens, float* out, int64_t stride) try {
    const Marian& model = *decoder->model;
    const int64_t rows = decoder->rows.size(), width = model.width;
    for (Row& row : decoder->rows)
        if (row.position % PAGE == 0) row.pages.push_back(decoder->new_page());
    // a row's end is not a whole number of pages from the next one's: rows would share a few places in the cache
    const int64_t wide = 3 * width + W, narrow = width + W, inner = model.inner + W;
    decoder->room.resize(rows * (wide + narrow + inner));
    float* at = decoder->room.data();
    const Rows projected{at, wide}, mixed{at + rows * wide, narrow}, between{at + rows * (wide + narrow), inner};
    with_vectors(width / model.heads / W, [&](auto vectors) {
#pragma omp parallel num_threads(decoder->threads)
        layers<decltype(vectors)::value>(*decoder, tokens, {out, stride}, projected, mixed, between);
    });
    for (int64_t l = 0; l < model.num_layers; l++) {
        const Layer& layer = model.layers[l];
        for (const Linear* each : {&layer.query, &layer.key, &layer.value, &layer.mixed, &layer.cross_query,
                                   &layer.cross_mixed, &layer.inner, &layer.outer})
            count(*each, rows);
    }
    for (Row& row : decoder->rows) {
        row.position++;
        operations += 4 * model.num_layers * width * (row.position + row.prompts->length);
    }
    return 1;
} catch (const std::bad_alloc&) {
    return 0;
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
