/* Run packed programs: see packed.h; program.h has their format.
 *
 * Images are [height][width][channels]. A pixel of signs is whole 64-bit words, least significant
 * bit first, bit 1 = +1; the bits behind the last channel are 0, in weights as well.
 *
 * Build with -ffp-contract=off: a * x + b is rounded twice, as torch does it in evaluation. */
#define _POSIX_C_SOURCE 200809L /* clock_gettime */
#include "packed.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "program.h"

#define INLINE static inline __attribute__((always_inline))
static const struct path *current_path(void);

enum { MAX_THREADS = 256 };
/* Work of an operation that is divided among threads; on less they would wait for each other longer
 * than they save. Tests divide everything. */
#ifndef DIVIDED_WORK
#define DIVIDED_WORK (1 << 18)
#endif

/* ---- Weights in the order of the inner loops ---- */

static int bit_of(const unsigned char *bits, int64_t index) { return bits[index / 8] >> (index % 8) & 1; }

static int64_t rounded_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

/* Memory on the border of a cache line, which no vector of 64 bytes then crosses. */
static void *aligned_zeros(int64_t bytes) {
    const int64_t whole = rounded_up(bytes > 0 ? bytes : 1, 64);
    void *memory = aligned_alloc(64, (size_t)whole);
    return memory ? memset(memory, 0, (size_t)whole) : 0;
}

/* File: [taps][channels][outputs] floats or signs.
 * Memory: [outputs / wide][taps][channels][wide]. */
static int prepare_floats(struct packed_network *n, struct operation *o) {
    const int64_t wide = n->path->dot_wide, taps = (int64_t)o->fields[KERNEL_H] * o->fields[KERNEL_W];
    const int64_t outputs = o->target->channels, depth = taps * o->source->channels;
    const unsigned char *data = n->tensors[o->fields[WEIGHT]].data;
    if (!reserve(n, rounded_up(outputs, wide) * depth * (int64_t)sizeof(float))) return 0;
    float *weight = aligned_zeros(rounded_up(outputs, wide) * depth * (int64_t)sizeof *weight);
    if (!weight) return 0;
    for (int64_t k = 0; k < depth; k++)
        for (int64_t output = 0; output < outputs; output++) {
            const int64_t from = k * outputs + output;
            float *to = weight + (output / wide * depth + k) * wide + output % wide;
            if (o->fields[FLAGS] & BINARY_WEIGHT)
                *to = bit_of(data, from) ? 1.0f : -1.0f;
            else
                *to = ((const float *)data)[from];
        }
    o->weight = weight;
    return 1;
}

/* Number the places of a window along an axis: those in the image share one. */
static int32_t number_places(int64_t positions, int64_t stride, int64_t before, int64_t kernel, int64_t size,
                             int is_always_inside, int32_t *place, int32_t *whole) {
    int32_t num = 0;
    *whole = -1;
    for (int64_t i = 0; i < positions; i++) {
        const int64_t from = i * stride - before;
        if (!is_always_inside && (from < 0 || from + kernel > size)) {
            place[i] = num++;
            continue;
        }
        if (*whole < 0) *whole = num++;
        place[i] = *whole;
    }
    return num;
}

/* Bits of taps on padding are 0 and look like -1: they are no products, unless the padding is +1.
 * ones: [taps][outputs], set bits of a tap. */
static int prepare_borders(struct packed_network *n, struct operation *o, const int32_t *ones) {
    const int32_t *f = o->fields;
    const struct buffer *s = o->source, *t = o->target;
    if (!reserve(n, 4 * (t->height + t->width))) return 0;
    o->row_place = calloc(t->height, sizeof *o->row_place);
    o->column_place = calloc(t->width, sizeof *o->column_place);
    if (!o->row_place || !o->column_place) return 0;
    const int has_ones = f[FLAGS] & PAD_ONES;
    const int64_t rows =
        number_places(t->height, f[STRIDE], f[TOP], f[KERNEL_H], s->height, has_ones, o->row_place, &o->whole_row);
    const int64_t columns =
        number_places(t->width, f[STRIDE], f[LEFT], f[KERNEL_W], s->width, has_ones, o->column_place, &o->whole_column);
    o->num_columns = columns;
    if (!reserve(n, 4 * rows * columns * (t->channels + 2))) return 0;
    o->num_products = calloc(rows * columns, sizeof *o->num_products);
    o->correction = calloc(rows * columns * t->channels, sizeof *o->correction);
    o->shifted_products = calloc(rows * columns, sizeof *o->shifted_products);
    if (!o->num_products || !o->correction || !o->shifted_products) return 0;
    for (int64_t y = 0; y < t->height; y++)
        for (int64_t x = 0; x < t->width; x++) {
            const int64_t place = o->row_place[y] * columns + o->column_place[x];
            if (o->num_products[place]) continue; /* of an earlier pixel */
            o->num_products[place] = (int32_t)(f[KERNEL_H] * f[KERNEL_W] * s->channels);
            const int64_t top = y * f[STRIDE] - f[TOP], left = x * f[STRIDE] - f[LEFT];
            for (int64_t i = 0; i < f[KERNEL_H] && !has_ones; i++)
                for (int64_t j = 0; j < f[KERNEL_W]; j++) {
                    if (top + i >= 0 && top + i < s->height && left + j >= 0 && left + j < s->width) continue;
                    o->num_products[place] -= (int32_t)s->channels;
                    for (int64_t c = 0; c < t->channels; c++)
                        o->correction[place * t->channels + c] -= ones[(i * f[KERNEL_W] + j) * t->channels + c];
                }
            o->shifted_products[place] = (float)((1 << 24) + o->num_products[place]);
        }
    return 1;
}

/* File: [outputs][taps][channels] signs. Memory: [outputs / wide][taps][words][parts][wide]. */
static int prepare_bits(struct packed_network *n, struct operation *o) {
    const int64_t wide = n->path->differ_wide, taps = (int64_t)o->fields[KERNEL_H] * o->fields[KERNEL_W];
    const int64_t outputs = o->target->channels, channels = o->source->channels, words = o->source->words;
    const int64_t parts = n->path->word_parts, bits = WORD / parts;
    const unsigned char *data = n->tensors[o->fields[WEIGHT]].data;
    if (!reserve(n, rounded_up(outputs, wide) * taps * words * 8 + taps * outputs * 4)) return 0;
    o->weight = aligned_zeros(rounded_up(outputs, wide) * taps * words * (int64_t)sizeof(uint64_t));
    int32_t *ones = calloc(taps * outputs, sizeof *ones);
    for (int64_t output = 0; o->weight && ones && output < outputs; output++)
        for (int64_t tap = 0; tap < taps; tap++)
            for (int64_t c = 0; c < channels; c++) {
                if (!bit_of(data, (output * taps + tap) * channels + c)) continue;
                const int64_t word = ((output / wide * taps + tap) * words + c / WORD) * wide;
                const int64_t part = word * parts + c % WORD / bits * wide + output % wide;
                if (parts == 2)
                    ((uint32_t *)o->weight)[part] |= (uint32_t)1 << (c % bits);
                else
                    ((uint64_t *)o->weight)[part] |= (uint64_t)1 << (c % bits);
                ones[tap * outputs + output]++;
            }
    const int is_prepared = o->weight && ones && prepare_borders(n, o, ones);
    free(ones);
    return is_prepared;
}

static int prepare(struct packed_network *n, struct operation *o) {
    const int32_t *f = o->fields;
    const struct buffer *s = o->source, *t = o->target;
    if (f[KIND] == NORMALIZE) {
        const int64_t numel = s->width * s->channels;
        float *rows = reserve(n, 8 * numel) ? malloc(2 * numel * sizeof *rows) : 0;
        o->weight = rows;
        for (int64_t i = 0; rows && i < numel; i++) {
            rows[i] = o->offset[i % s->channels];
            rows[numel + i] = o->factor[i % s->channels];
        }
        return rows != 0;
    }
    if (f[KIND] != CONV && f[KIND] != BINARY_CONV) return 1;
    const int64_t rows = (t->height - 1) * f[STRIDE] + f[KERNEL_H], columns = (t->width - 1) * f[STRIDE] + f[KERNEL_W];
    o->is_padded = f[TOP] || f[LEFT] || rows > s->height || columns > s->width;
    o->row_values = (o->is_padded ? columns : s->width) * (f[KIND] == CONV ? s->channels : s->words);
    const int64_t bytes = o->is_padded ? rows * o->row_values * (f[KIND] == CONV ? 4 : 8) : 0;
    if (bytes > n->padded_bytes) n->padded_bytes = bytes;
    const int64_t scratch = 4 * t->width * rounded_up(t->channels, WORD);
    if (scratch > n->scratch_bytes) n->scratch_bytes = scratch;
    return f[KIND] == CONV ? prepare_floats(n, o) : prepare_bits(n, o);
}

void packed_free(struct packed_network *n) {
    if (!n) return;
    for (int i = 0; n->operations && i < n->num_operations; i++) {
        free(n->operations[i].weight);
        free(n->operations[i].row_place);
        free(n->operations[i].column_place);
        free(n->operations[i].num_products);
        free(n->operations[i].shifted_products);
        free(n->operations[i].correction);
    }
    for (int i = 0; n->slots && i < n->num_slots; i++) free(n->slots[i]);
    free(n->slots);
    free(n->holders);
    free(n->padded);
    free(n->scratch);
    free(n->operations);
    free(n->seconds);
    free(n->buffers);
    free(n->tensors);
    free(n->description);
    free(n->file);
    free(n);
}

static const char *load(struct packed_network *n, const void *file, size_t num_bytes) {
    struct tensor program = {"", 0, {0}, 0, 0}, buffers = program;
    if (num_bytes > (size_t)MAX_MEMORY || !reserve(n, (int64_t)num_bytes)) return "it is larger than 1 GiB";
    n->path = current_path();
    n->num_tensors = MAX_TENSORS;
    n->tensors = calloc(MAX_TENSORS, sizeof *n->tensors);
    n->file = malloc(num_bytes + 1);
    if (!n->tensors || !n->file) return "there is not enough memory";
    memcpy(n->file, file, num_bytes);
    const char *wrong = read_header(n, (int64_t)num_bytes, &program, &buffers);
    if (!wrong) wrong = read_buffers(n, &buffers);
    if (!wrong) wrong = read_operations(n, &program);
    if (wrong) return wrong;
    for (int i = 0; i < n->num_operations; i++)
        if (!prepare(n, n->operations + i)) return "it needs more memory than there is, or than 1 GiB";
    n->slots = calloc(n->num_slots, sizeof *n->slots);
    if (!n->slots) return "there is not enough memory";
    for (int slot = 0; slot < n->num_slots; slot++) {
        int64_t most = 1;
        for (int i = 0; i < n->num_buffers; i++) {
            const struct buffer *b = n->buffers + i;
            const int64_t bytes = b->height * b->width * b->pixel_bytes;
            if (b->slot == slot && bytes > most) most = bytes;
        }
        n->slots[slot] = reserve(n, most) ? aligned_zeros(most) : 0;
        if (!n->slots[slot]) return "it needs more memory than there is, or than 1 GiB";
    }
    n->padded = reserve(n, n->padded_bytes + n->scratch_bytes) ? aligned_zeros(n->padded_bytes + 64) : 0;
    return n->padded ? 0 : "it needs more memory than there is, or than 1 GiB";
}

struct packed_network *packed_load(const void *file, size_t num_bytes, char *error, size_t error_size) {
    struct packed_network *n = calloc(1, sizeof *n);
    const char *wrong = n ? load(n, file, num_bytes) : "there is not enough memory";
    if (!wrong) return n;
    if (error_size) snprintf(error, error_size, "%s", wrong);
    packed_free(n);
    return 0;
}

/* ---- Rows of operations, compiled once per instruction set ---- */

typedef void dot_function(int64_t, const float *, int64_t, int64_t, const float *, int64_t, int64_t, int64_t, float *);
typedef void differ_function(int64_t, const uint64_t *, int64_t, int64_t, const uint64_t *, int64_t, int64_t, int64_t,
                             int32_t *);
typedef uint64_t mask_function(const float *);
struct epilogue;
typedef void fused_function(int64_t, const uint64_t *, int64_t, int64_t, const uint64_t *, int64_t, int64_t, int64_t,
                            const struct epilogue *);

static void *values_of(const struct packed_network *n, const struct buffer *b) { return n->slots[b->slot]; }

/* Words whose bits are 1 where a value is not negative; torch's sign of a NaN counts as +1. `mask`
 * has the bits of 64 values that are. */
INLINE void pack(const float *values, int64_t num, uint64_t *bits, mask_function *mask) {
    int64_t c = 0;
    for (; c + WORD <= num; c += WORD) bits[c / WORD] = ~mask(values + c);
    if (c == num) return;
    float rest[WORD];
    for (int i = 0; i < WORD; i++) rest[i] = c + i < num ? values[c + i] : -1.0f;
    bits[c / WORD] = ~mask(rest);
}

/* The signs of a result after its shift, if it has one. */
INLINE void pack_result(const struct operation *o, const float *values, int64_t first, int64_t num, uint64_t *bits,
                        mask_function *mask) {
    if (!o->sign_shift) {
        pack(values, num, bits, mask);
        return;
    }
    for (int64_t c = 0; c < num; c += WORD) {
        float word[WORD];
        const int64_t most = num - c < WORD ? num - c : WORD;
        for (int64_t i = 0; i < most; i++) word[i] = values[c + i] + o->sign_shift[first + c + i];
        pack(word, most, bits + c / WORD, mask);
    }
}

/* The steps of a result of up to 64 channels, in the order of torch's operators, each rounded. */
INLINE void finish_word(const struct operation *o, float *restrict word, const float *restrict added, int64_t first,
                        const int64_t num) {
    const float *restrict factor = o->factor ? o->factor + first : 0;
    const float *restrict offset = o->offset ? o->offset + first : 0;
    const float *restrict shift = o->shift ? o->shift + first : 0;
    const float *restrict slope = o->slope ? o->slope + first : 0;
    const float *restrict after = o->after ? o->after + first : 0;
    if (o->fields[FLAGS] & RELU_FIRST)
        for (int64_t c = 0; c < num; c++) word[c] = word[c] < 0.0f ? 0.0f : word[c];
    if (factor)
        for (int64_t c = 0; c < num; c++) word[c] *= factor[c];
    if (offset)
        for (int64_t c = 0; c < num; c++) word[c] += offset[c];
    if (added)
        for (int64_t c = 0; c < num; c++) word[c] += added[c];
    if (shift)
        for (int64_t c = 0; c < num; c++) word[c] += shift[c];
    if (o->fields[FLAGS] & RELU)
        for (int64_t c = 0; c < num; c++) word[c] = word[c] < 0.0f ? 0.0f : word[c];
    if (slope)
        for (int64_t c = 0; c < num; c++) word[c] = word[c] < 0.0f ? word[c] * slope[c] : word[c];
    if (after)
        for (int64_t c = 0; c < num; c++) word[c] += after[c];
}

/* Up to 64 values of a pixel: floats, or sums of `num_products` signs of which `differing` are -1. */
INLINE void take_word(float *restrict word, const float *values, const int32_t *differing, int32_t num_products,
                      const int64_t num) {
    if (differing)
        for (int64_t c = 0; c < num; c++) word[c] = (float)(num_products - 2 * differing[c]);
    else
        memcpy(word, values, num * sizeof *word);
}

/* A pixel of FLOATS from `values`, or from `differing`. `added` and `bits` may be NULL. */
INLINE void finish(const struct operation *o, const float *values, const int32_t *differing, int32_t num_products,
                   const float *added, int64_t first, int64_t num, float *out, uint64_t *bits, mask_function *mask) {
    for (int64_t c = 0; c < num; c += WORD) {
        float word[WORD]; /* values and added may be out itself */
        const int64_t most = num - c < WORD ? num - c : WORD;
        const float *from = values ? values + c : 0;
        const int32_t *counts = differing ? differing + c : 0;
        if (most == WORD) { /* a constant, for loops without ends */
            take_word(word, from, counts, num_products, WORD);
            finish_word(o, word, added ? added + c : 0, first + c, WORD);
            memcpy(out + c, word, sizeof word);
        } else {
            take_word(word, from, counts, num_products, most);
            finish_word(o, word, added ? added + c : 0, first + c, most);
            memcpy(out + c, word, most * sizeof *word);
        }
        if (bits) pack_result(o, word, first + c, most, bits + c / WORD, mask);
    }
}

/* Both sides are below 2^24 or beyond every sum, so floats hold them. */
INLINE void compare(const struct operation *o, const int32_t *sums, int64_t first, int64_t num, uint64_t *bits,
                    mask_function *mask) {
    const int32_t *direction = o->direction + first, *threshold = o->threshold + first;
    for (int64_t c = 0; c < num; c += WORD) {
        float above[WORD];
        const int64_t most = num - c < WORD ? num - c : WORD;
        for (int64_t i = 0; i < most; i++) above[i] = (float)(sums[c + i] * direction[c + i] - threshold[c + i]);
        pack(above, most, bits + c / WORD, mask);
    }
}

/* Where `differ` gets its input for the row y of a convolution, and writes. */
struct row {
    const void *source, *weight;
    int64_t step, run;
    float *scratch;
};

/* Outputs `first` to `first + num` of the pixels of row y; `first` is a multiple of 64. */
INLINE void convolve_pixels(struct packed_network *n, const struct operation *o, int64_t y, int64_t first, int64_t num,
                            const struct row *row, const int64_t wide, dot_function *dot, differ_function *differ,
                            mask_function *mask) {
    const struct buffer *t = o->target;
    const int64_t padded = (num + wide - 1) / wide * wide;
    const int is_binary = o->fields[KIND] == BINARY_CONV;
    const float *added = o->other ? (const float *)values_of(n, o->other) : 0;
    if (is_binary)
        differ(t->width, row->source, o->row_values, row->step, row->weight, o->fields[KERNEL_H], row->run, num,
               (int32_t *)row->scratch);
    else
        dot(t->width, row->source, o->row_values, row->step, row->weight, o->fields[KERNEL_H], row->run, num,
            row->scratch);
    for (int64_t x = 0; x < t->width; x++) {
        const int64_t pixel = y * t->width + x, to = pixel * t->channels + first;
        const float *values = row->scratch + x * padded;
        int32_t *sums = is_binary ? (int32_t *)row->scratch + x * padded : 0, num_products = 0;
        if (is_binary) {
            const int64_t place = o->row_place[y] * o->num_columns + o->column_place[x];
            num_products = o->num_products[place];
            for (int64_t c = 0; c < num; c++) sums[c] += o->correction[place * t->channels + first + c];
            if (t->type != FLOATS)
                for (int64_t c = 0; c < num; c++) sums[c] = num_products - 2 * sums[c];
            if (n->traced_sums && n->operations + n->traced == o)
                for (int64_t c = 0; c < num; c++)
                    n->traced_sums[to + c] = t->type == FLOATS ? num_products - 2 * sums[c] : sums[c];
            if (t->type == SUMS) {
                memcpy((int32_t *)values_of(n, t) + to, sums, num * sizeof *sums);
                continue;
            }
            if (t->type == SIGNS) {
                compare(o, sums, first, num, (uint64_t *)values_of(n, t) + pixel * t->words + first / WORD, mask);
                continue;
            }
        }
        float *out = (float *)values_of(n, t) + to;
        uint64_t *bits = o->signs ? (uint64_t *)values_of(n, o->signs) + pixel * t->words + first / WORD : 0;
        finish(o, is_binary ? 0 : values, sums, num_products, added ? added + to : 0, first, num, out, bits, mask);
    }
}

/* The last steps of pixels without a detour through memory: for FLOATS of whole blocks of channels.
 * Pointers are those of the first pixel of a row and of output `first`. */
struct epilogue {
    const float *factor, *offset, *added, *shift, *slope, *after, *sign_shift;
    const float *shifted_products;            /* as in struct operation, from the place of this row */
    const int32_t *column_place, *correction; /* the same */
    float *out;
    uint64_t *bits;
    int64_t channels, words;
    int64_t whole; /* column place whose windows lack no tap; -1 if all do */
    int has_relu, has_relu_first;
    int is_plain; /* no ReLU, shift, slope, after or sign_shift */
};

/* All pixels of row y. */
INLINE void fuse_row(struct packed_network *n, const struct operation *o, int64_t y, int64_t first, int64_t num,
                     const struct row *row, fused_function *fused) {
    const struct buffer *t = o->target;
    const int64_t pixel = y * t->width, to = pixel * t->channels + first;
    const int64_t place = o->row_place[y] * o->num_columns;
    const int has_steps = o->shift || o->slope || o->after || o->sign_shift;
    if (o->signs && num % WORD) /* of the last word, half is written */
        for (int64_t x = 0; x < t->width; x++)
            ((uint64_t *)values_of(n, o->signs))[(pixel + x) * t->words + (first + num) / WORD] = 0;
    const struct epilogue e = {
        .factor = o->factor ? o->factor + first : 0,
        .offset = o->offset ? o->offset + first : 0,
        .added = o->other ? (const float *)values_of(n, o->other) + to : 0,
        .column_place = o->column_place,
        .shifted_products = o->shifted_products + place,
        .correction = o->correction + place * t->channels + first,
        .out = (float *)values_of(n, t) + to,
        .bits = o->signs ? (uint64_t *)values_of(n, o->signs) + pixel * t->words + first / WORD : 0,
        .channels = t->channels,
        .words = t->words,
        .whole = o->whole_row == o->row_place[y] ? o->whole_column : -1,
        .shift = o->shift ? o->shift + first : 0,
        .slope = o->slope ? o->slope + first : 0,
        .after = o->after ? o->after + first : 0,
        .sign_shift = o->sign_shift ? o->sign_shift + first : 0,
        .has_relu = o->fields[FLAGS] & RELU,
        .has_relu_first = o->fields[FLAGS] & RELU_FIRST,
        .is_plain = !has_steps && !(o->fields[FLAGS] & (RELU | RELU_FIRST)),
    };
    fused(t->width, row->source, o->row_values, row->step, row->weight, o->fields[KERNEL_H], row->run, num, &e);
}

/* Row y of a convolution; `fused` is NULL where an instruction set has none. */
INLINE void convolve_row(struct packed_network *n, const struct operation *o, int64_t y, int64_t first, int64_t num,
                         void *scratch, const int64_t wide, dot_function *dot, differ_function *differ,
                         fused_function *fused, mask_function *mask) {
    const struct buffer *s = o->source, *t = o->target;
    const int32_t *f = o->fields;
    const int is_binary = f[KIND] == BINARY_CONV;
    const int64_t depth = is_binary ? s->words : s->channels, value = is_binary ? sizeof(uint64_t) : sizeof(float);
    const unsigned char *source = o->is_padded ? n->padded : values_of(n, s);
    const struct row row = {
        source + y * f[STRIDE] * o->row_values * value,
        (const unsigned char *)o->weight + first * f[KERNEL_H] * f[KERNEL_W] * depth * value,
        f[STRIDE] * depth,
        f[KERNEL_W] * depth,
        scratch,
    };
    /* finish_avx512 counts on floats that hold 2^24 + an even number. */
    const int is_exact = s->channels % 2 == 0 && f[KERNEL_H] * f[KERNEL_W] * s->channels < 1 << 23;
    if (fused && is_binary && is_exact && t->type == FLOATS && num % wide == 0 && !n->traced_sums)
        fuse_row(n, o, y, first, num, &row, fused);
    else
        convolve_pixels(n, o, y, first, num, &row, wide, dot, differ, mask);
}

#include "maps.h"
#include "paths.h"

/* ---- Running ---- */

/* Zeros, or +1 in all channels of pixels. */
static void fill_padding(const struct operation *o, unsigned char *to, int64_t bytes) {
    const struct buffer *s = o->source;
    const int has_ones = o->fields[FLAGS] & PAD_ONES && o->fields[KIND] == BINARY_CONV;
    memset(to, has_ones ? 0xff : 0, bytes);
    if (!has_ones || s->channels % WORD == 0) return;
    const uint64_t last = ((uint64_t)1 << (s->channels % WORD)) - 1;
    for (int64_t end = s->pixel_bytes; end <= bytes; end += s->pixel_bytes) {
        uint64_t word;
        memcpy(&word, to + end - sizeof word, sizeof word);
        word &= last;
        memcpy(to + end - sizeof word, &word, sizeof word);
    }
}

/* A row of the source with padding around it. */
static void pad_row(const struct packed_network *n, const struct operation *o, int64_t row) {
    const struct buffer *s = o->source;
    const int64_t top = o->fields[TOP], left = o->fields[LEFT], value = o->fields[KIND] == CONV ? 4 : 8;
    const int64_t pixel = s->pixel_bytes, bytes = o->row_values * value;
    unsigned char *to = n->padded + row * bytes;
    if (row < top || row - top >= s->height) {
        fill_padding(o, to, bytes);
        return;
    }
    int64_t copied = s->width * pixel;
    if (copied > bytes - left * pixel) copied = bytes - left * pixel;
    fill_padding(o, to, left * pixel);
    memcpy(to + left * pixel, (unsigned char *)values_of(n, s) + (row - top) * s->width * pixel, copied);
    fill_padding(o, to + left * pixel + copied, bytes - left * pixel - copied);
}

static void run_convolution(struct packed_network *n, const struct operation *o, int num_threads) {
    const struct buffer *t = o->target;
    const int64_t rows = (t->height - 1) * o->fields[STRIDE] + o->fields[KERNEL_H];
    const int64_t blocks = (t->channels + WORD - 1) / WORD;
    /* A few rows: divide the outputs as well. */
    const int64_t parts = t->height >= 4 * num_threads ? 1 : blocks < num_threads ? blocks : num_threads;
#pragma omp parallel num_threads(num_threads)
    {
        unsigned char *scratch = n->scratch;
#ifdef _OPENMP
        scratch += omp_get_thread_num() * n->scratch_bytes;
#endif
        if (o->is_padded) {
#pragma omp for schedule(static)
            for (int64_t row = 0; row < rows; row++) pad_row(n, o, row);
        }
#pragma omp for schedule(static)
        for (int64_t task = 0; task < t->height * parts; task++) {
            const int64_t part = task % parts;
            const int64_t first = blocks * part / parts * WORD, last = blocks * (part + 1) / parts * WORD;
            n->path->convolve_row(n, o, task / parts, first, (last < t->channels ? last : t->channels) - first,
                                  scratch);
        }
    }
}

static void run_mean(struct packed_network *n, const struct operation *o) {
    const int64_t channels = o->source->channels, pixels = o->source->height * o->source->width;
    const float *in = values_of(n, o->source);
    float *out = values_of(n, o->target);
    for (int64_t c = 0; c < channels; c++) out[c] = in[c];
    for (int64_t pixel = 1; pixel < pixels; pixel++)
        for (int64_t c = 0; c < channels; c++) out[c] += in[pixel * channels + c];
    for (int64_t c = 0; c < channels; c++) out[c] /= (float)pixels;
    if (o->signs) pack_result(o, out, 0, channels, values_of(n, o->signs), mask_portable);
}

static void run_operation(struct packed_network *n, const struct operation *o, int num_threads) {
    if (o->work < DIVIDED_WORK) num_threads = 1;
    switch (o->fields[KIND]) {
    case CONV:
    case BINARY_CONV:
        run_convolution(n, o, num_threads);
        break;
    case MEAN:
        run_mean(n, o);
        break;
    default:
#pragma omp parallel for num_threads(num_threads) schedule(static)
        for (int64_t y = 0; y < o->target->height; y++) n->path->map_row(n, o, y);
    }
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

int packed_run(struct packed_network *n, const void *pixels, enum packed_pixels kind, float *logits, int num_threads) {
#ifndef _OPENMP
    num_threads = 1;
#endif
    if (num_threads < 1) num_threads = 1;
    if (num_threads > MAX_THREADS) num_threads = MAX_THREADS;
    /* One scratch is reserved. */
    const int64_t others = n->scratch_bytes ? (MAX_MEMORY - n->memory) / n->scratch_bytes : MAX_THREADS;
    if (num_threads > 1 + others) num_threads = 1 + (int)others;
    if (num_threads > n->num_scratches) {
        unsigned char *scratch = realloc(n->scratch, (size_t)(num_threads * n->scratch_bytes + 64));
        if (!scratch) return -1;
        n->scratch = scratch;
        n->num_scratches = num_threads;
    }
    n->pixels = pixels;
    n->pixel_kind = kind;
    double before = now();
    for (int i = 0; i < n->num_operations; i++) {
        run_operation(n, n->operations + i, num_threads);
        const double after = now();
        n->seconds[i] = after - before;
        before = after;
    }
    const struct buffer *last = n->operations[n->num_operations - 1].target;
    memcpy(logits, values_of(n, last), last->channels * sizeof *logits);
    return 0;
}

void packed_image_size(const struct packed_network *n, int size[3]) {
    const struct buffer *image = n->operations[0].source;
    size[0] = (int)image->height, size[1] = (int)image->width, size[2] = (int)image->channels;
}

int packed_num_classes(const struct packed_network *n) {
    return (int)n->operations[n->num_operations - 1].target->channels;
}

int packed_class_name(const struct packed_network *n, int index, char *name, size_t size) {
    struct cursor c = find(n->description, "classes");
    if (index < 0 || !take(&c, '[')) return -1;
    for (int i = 0; i < index; i++)
        if (!take_string(&c, 0, 0) || !take(&c, ',')) return -1;
    return take_string(&c, name, size) ? 0 : -1;
}

int packed_num_operations(const struct packed_network *n) { return n->num_operations; }
const double *packed_seconds(const struct packed_network *n) { return n->seconds; }

size_t packed_sums_size(const struct packed_network *n, int index) {
    if (index < 0 || index >= n->num_operations || n->operations[index].fields[KIND] != BINARY_CONV) return 0;
    const struct buffer *t = n->operations[index].target;
    return (size_t)(t->height * t->width * t->channels);
}

int packed_sums(struct packed_network *n, const void *pixels, enum packed_pixels kind, int index, int32_t *sums,
                int num_threads) {
    if (!packed_sums_size(n, index)) return -1;
    float *logits = malloc(packed_num_classes(n) * sizeof *logits);
    if (!logits) return -1;
    n->traced = index;
    n->traced_sums = sums;
    const int result = packed_run(n, pixels, kind, logits, num_threads);
    n->traced_sums = 0;
    free(logits);
    return result;
}
