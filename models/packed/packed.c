/* Read a packed program file, check it, and run it: see packed.h.
 *
 * The file is safetensors: 8 bytes with the length of a JSON header, the header, then tensors. "program" (int32 [operations]
 * [FIELDS]) lists the operations and "buffers" (int32 [buffers][BUFFER_FIELDS]) the images between them; the others, "0", "1",
 * ..., hold weights. Everything that an operation reads or writes is checked when the file is loaded, so running needs no checks.
 *
 * Images are [height][width][channels]. A pixel of signs is whole 64-bit words, least significant bit first, bit 1 = +1; the bits
 * behind the last channel are 0, in weights as well.
 *
 * Build with -ffp-contract=off: a * x + b is rounded twice, as torch does it in evaluation. */
#define _POSIX_C_SOURCE 200809L /* clock_gettime */
#include "packed.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#if defined __x86_64__
#include <immintrin.h>
#elif defined __aarch64__
#include <arm_neon.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

#define INLINE static inline __attribute__((always_inline))
enum { WORD = 64, LANES = 8, FIELDS = 20, BUFFER_FIELDS = 5, MAX_TENSORS = 4096, MAX_SIDE = 1 << 15, MAX_THREADS = 256 };
enum { FORMAT = 1, MAX_THRESHOLD = 1 << 30 };
static const int64_t MAX_NUMEL = (int64_t)1 << 28;
/* Bytes of the file, weights and images; a file of a few kB may ask for any number. */
static const int64_t MAX_MEMORY = (int64_t)1 << 30;
/* Comparisons of words, products of floats and values that pools and maps read, for an image: about a minute at worst. */
static const int64_t MAX_WORK = (int64_t)1 << 36;
/* Work of an operation that is divided among threads; on less they would wait for each other longer than they save. */
static const int64_t DIVIDED_WORK = 1 << 18;

enum type { FLOATS, SIGNS, SUMS, NUM_TYPES };
enum kind { NORMALIZE, CONV, BINARY_CONV, AFFINE, LAYER_NORM, MAX_POOL, AVG_POOL, SIGN, THRESHOLD, MEAN, ADD, NUM_KINDS };
enum flags { RELU = 1, BINARY_WEIGHT = 2 };
/* Fields of an operation; -1 for a buffer or tensor that it does not have. FACTOR and OFFSET: of a channel; thresholds and their
 * directions where the target is signs; deviation and mean of NORMALIZE. REAL: bits of a float, the epsilon of LAYER_NORM.
 * SIGNS_OF: a buffer for the signs of the result, which are packed along the way. */
enum field { KIND, SOURCE, OTHER, TARGET_BUFFER, KERNEL_H, KERNEL_W, STRIDE, TOP, LEFT, FLAGS, WEIGHT, FACTOR, OFFSET, REAL, SIGNS_OF };

struct packed_network;
struct operation;

/* The functions of an instruction set. */
struct path {
    const char *name;
    int dot_wide, differ_wide; /* outputs of a block of weights */
    void (*convolve_row)(struct packed_network *, const struct operation *, int64_t y, int64_t first, int64_t num, void *scratch);
    void (*map_row)(struct packed_network *, const struct operation *, int64_t y);
};
static const struct path *current_path(void);

/* ---- The file ---- */

struct tensor {
    char dtype[5];
    int num_dimensions;
    int64_t shape[4], numel;
    const unsigned char *data;
};

struct buffer {
    int64_t height, width, channels, words, pixel_bytes;
    enum type type;
    int slot;
};

struct operation {
    int32_t fields[FIELDS];
    const struct buffer *source, *target, *other, *signs;
    int64_t row_values;   /* of a padded row of the source, in words or floats */
    int64_t work;
    int is_padded;
    void *weight;         /* in blocks of the path; NORMALIZE: means and deviations of a row */
    int32_t *ones;        /* binary convolution: [taps][outputs], set bits of a tap */
    const float *factor, *offset;
    const int32_t *threshold, *direction;
};

struct packed_network {
    const struct path *path;
    unsigned char *file;
    char *description; /* JSON */
    struct tensor *tensors;
    struct buffer *buffers;
    struct operation *operations;
    double *seconds;
    int num_tensors, num_buffers, num_operations, num_slots;
    unsigned char **slots, *padded, *scratch;
    int *holders; /* 1 + the buffer that is in a slot, while operations are checked */
    int64_t memory, work, padded_bytes, scratch_bytes;
    int num_scratches;
    const void *pixels;
    enum packed_pixels pixel_kind;
    int32_t *traced_sums;
    int traced;
};

/* Count memory before it is allocated; 0 if a network of this size is refused. */
static int reserve(struct packed_network *n, int64_t bytes) {
    n->memory += bytes;
    return n->memory <= MAX_MEMORY;
}

struct cursor {
    const char *at, *end;
};

static void skip_space(struct cursor *c) {
    while (c->at < c->end && (*c->at == ' ' || *c->at == '\n' || *c->at == '\t' || *c->at == '\r')) c->at++;
}

static int take(struct cursor *c, char symbol) {
    skip_space(c);
    if (c->at == c->end || *c->at != symbol) return 0;
    c->at++;
    return 1;
}

static int32_t take_hex(struct cursor *c) {
    int32_t number = 0;
    if (c->end - c->at < 4) return -1;
    for (int i = 0; i < 4; i++, c->at++) {
        const char *digits = "0123456789abcdef", symbol = *c->at >= 'A' && *c->at <= 'F' ? (char)(*c->at + 32) : *c->at;
        const char *digit = symbol ? strchr(digits, symbol) : 0;
        if (!digit) return -1;
        number = 16 * number + (int32_t)(digit - digits);
    }
    return number;
}

/* A character behind a backslash, as UTF-8; returns its length, or 0. */
static int take_escape(struct cursor *c, char bytes[4]) {
    static const char *symbols = "\"\\/bfnrt", *values = "\"\\/\b\f\n\r\t";
    const char symbol = c->at < c->end ? *c->at++ : 0, *found = symbol ? strchr(symbols, symbol) : 0;
    if (found) {
        bytes[0] = values[found - symbols];
        return 1;
    }
    int32_t point = symbol == 'u' ? take_hex(c) : -1;
    if (point >= 0xd800 && point < 0xdc00) { /* the first half of a pair */
        if (c->end - c->at < 2 || c->at[0] != '\\' || c->at[1] != 'u') return 0;
        c->at += 2;
        const int32_t second = take_hex(c);
        if (second < 0xdc00 || second > 0xdfff) return 0;
        point = 0x10000 + ((point - 0xd800) << 10) + (second - 0xdc00);
    }
    if (point <= 0) return 0;
    const int length = point < 0x80 ? 1 : point < 0x800 ? 2 : point < 0x10000 ? 3 : 4;
    for (int i = length - 1; i > 0; i--, point >>= 6) bytes[i] = (char)(0x80 | (point & 0x3f));
    bytes[0] = (char)(length == 1 ? point : (0xf00 >> length & 0xf0) | point);
    return length;
}

/* A string; `text` gets as many of its characters as fit into `size`. Returns the size of all of it, or 0 if it is damaged. */
static size_t take_string(struct cursor *c, char *text, size_t size) {
    size_t length = 0, written = 0;
    if (!take(c, '"')) return 0;
    while (c->at < c->end && *c->at != '"') {
        char bytes[4] = {*c->at++};
        const int num = bytes[0] == '\\' ? take_escape(c, bytes) : 1;
        if (!num) return 0;
        if (written == length && length + (size_t)num < size) {
            memcpy(text + length, bytes, (size_t)num);
            written += (size_t)num;
        }
        length += (size_t)num;
    }
    if (size) text[written] = 0;
    return take(c, '"') ? length + 1 : 0;
}

/* A key of an object and its colon. */
static int take_key(struct cursor *c, char *text, size_t size) {
    const size_t needed = take_string(c, text, size);
    return needed && needed <= size && take(c, ':');
}

static int64_t take_number(struct cursor *c) {
    int64_t number = 0;
    skip_space(c);
    if (c->at == c->end || *c->at < '0' || *c->at > '9') return -1;
    for (; c->at < c->end && *c->at >= '0' && *c->at <= '9'; c->at++) {
        number = 10 * number + (*c->at - '0');
        if (number > (int64_t)1 << 40) return -1;
    }
    return number;
}

static int take_numbers(struct cursor *c, int64_t *numbers, int most) {
    int count = 0;
    if (!take(c, '[')) return -1;
    if (take(c, ']')) return 0;
    do {
        const int64_t number = take_number(c);
        if (count == most || number < 0) return -1;
        numbers[count++] = number;
    } while (take(c, ','));
    return take(c, ']') ? count : -1;
}

/* A value of any type: words and strings up to the bracket that closes the first. */
static int skip_value(struct cursor *c) {
    int64_t depth = 0;
    do {
        skip_space(c);
        if (c->at == c->end) return 0;
        const char symbol = *c->at;
        if (symbol == '"') {
            if (!take_string(c, 0, 0)) return 0;
        } else if (symbol == '[' || symbol == '{') {
            depth++, c->at++;
        } else if (memchr("]},:", symbol, 4)) {
            if (depth == 0) return 0;
            depth -= symbol == ']' || symbol == '}';
            c->at++;
        } else {
            while (c->at < c->end && !memchr(" \n\t\r\"[]{},:", *c->at, 11)) c->at++;
        }
    } while (depth > 0);
    return 1;
}

/* The value of a key of the description; nothing if there is none. */
static struct cursor find(const char *description, const char *name) {
    struct cursor c = {description, description + strlen(description)};
    char key[16];
    if (!take(&c, '{')) return (struct cursor){0, 0};
    do {
        const size_t size = take_string(&c, key, sizeof key);
        if (!size || !take(&c, ':')) break;
        if (size <= sizeof key && !strcmp(key, name)) return c;
        if (!skip_value(&c)) break;
    } while (take(&c, ','));
    return (struct cursor){0, 0};
}

/* The metadata are strings; the one of bitfleet is kept. */
static int take_metadata(struct packed_network *n, struct cursor *c) {
    char key[16];
    if (!take(c, '{')) return 0;
    if (take(c, '}')) return 1;
    do {
        const size_t size = take_string(c, key, sizeof key);
        if (!size || !take(c, ':')) return 0;
        struct cursor value = *c;
        const size_t needed = take_string(c, 0, 0);
        if (!needed) return 0;
        if (size > sizeof key || strcmp(key, "bitfleet") || n->description) continue;
        n->description = reserve(n, (int64_t)needed) ? malloc(needed) : 0;
        if (!n->description) return 0;
        take_string(&value, n->description, needed);
    } while (take(c, ','));
    return take(c, '}');
}

static int64_t size_of(const char *dtype) {
    return !strcmp(dtype, "U8") ? 1 : !strcmp(dtype, "F32") || !strcmp(dtype, "I32") ? 4 : 0;
}

/* The entry of a tensor in the header, after its name. */
static int take_tensor(struct cursor *c, const unsigned char *data, int64_t num_bytes, struct tensor *tensor) {
    char key[16];
    int64_t offsets[2] = {0, -1};
    int has_shape = 0;
    if (!take(c, '{')) return 0;
    do {
        if (!take_key(c, key, sizeof key)) return 0;
        if (!strcmp(key, "dtype")) {
            const size_t size = take_string(c, tensor->dtype, sizeof tensor->dtype);
            if (!size || size > sizeof tensor->dtype) return 0;
        } else if (!strcmp(key, "shape")) {
            tensor->num_dimensions = take_numbers(c, tensor->shape, 4);
            has_shape = tensor->num_dimensions >= 0;
        } else if (!strcmp(key, "data_offsets")) {
            if (take_numbers(c, offsets, 2) != 2) return 0;
        } else {
            return 0;
        }
    } while (take(c, ','));
    if (!take(c, '}') || !has_shape || !size_of(tensor->dtype)) return 0;
    tensor->numel = 1;
    for (int i = 0; i < tensor->num_dimensions; i++) {
        if (tensor->shape[i] < 1 || tensor->shape[i] > MAX_NUMEL) return 0;
        tensor->numel *= tensor->shape[i];
        if (tensor->numel > MAX_NUMEL) return 0;
    }
    if (offsets[0] > offsets[1] || offsets[1] > num_bytes || offsets[1] - offsets[0] != tensor->numel * size_of(tensor->dtype)) return 0;
    tensor->data = data + offsets[0];
    return (uintptr_t)tensor->data % size_of(tensor->dtype) == 0;
}

/* The number that is the name of a weight, or -1. */
static int index_of(const char *name) {
    int index = 0;
    if (!*name || strlen(name) > 4) return -1;
    for (; *name >= '0' && *name <= '9'; name++) index = 10 * index + (*name - '0');
    return *name || index >= MAX_TENSORS ? -1 : index;
}

static const char *read_header(struct packed_network *n, int64_t num_bytes, struct tensor *program, struct tensor *buffers) {
    uint64_t length = 0;
    if (num_bytes < 8) return "it is not a safetensors file";
    for (int i = 0; i < 8; i++) length |= (uint64_t)n->file[i] << (8 * i);
    if (length > (uint64_t)num_bytes - 8) return "it is not a safetensors file, or cut off";
    struct cursor c = {(const char *)n->file + 8, (const char *)n->file + 8 + length};
    const unsigned char *data = n->file + 8 + length;
    if (!take(&c, '{')) return "its header is damaged";
    do {
        char name[16];
        if (!take_key(&c, name, sizeof name)) return "its header is damaged";
        if (!strcmp(name, "__metadata__")) {
            if (!take_metadata(n, &c)) return "its metadata is damaged";
            continue;
        }
        const int is_program = !strcmp(name, "program"), is_buffers = !strcmp(name, "buffers"), index = index_of(name);
        if (!is_program && !is_buffers && index < 0) return "a tensor has a foreign name";
        struct tensor *tensor = is_program ? program : is_buffers ? buffers : n->tensors + index;
        if (tensor->data) return "a tensor is there twice";
        if (!take_tensor(&c, data, num_bytes - 8 - (int64_t)length, tensor)) return "a tensor is damaged or cut off";
    } while (take(&c, ','));
    if (!take(&c, '}')) return "its header is damaged";
    if (!program->data || !buffers->data || !n->description) return "it holds no program of bitfleet";
    struct cursor format = find(n->description, "format");
    return take_number(&format) == FORMAT ? 0 : "it is of another version of bitfleet";
}

static int is_table(const struct tensor *t, int64_t columns) {
    return !strcmp(t->dtype, "I32") && t->num_dimensions == 2 && t->shape[1] == columns && t->shape[0] <= MAX_TENSORS;
}

static const char *read_buffers(struct packed_network *n, const struct tensor *table) {
    if (!is_table(table, BUFFER_FIELDS)) return "its table of buffers is damaged";
    n->num_buffers = (int)table->shape[0];
    n->buffers = calloc(n->num_buffers, sizeof *n->buffers);
    if (!n->buffers) return "there is not enough memory";
    for (int i = 0; i < n->num_buffers; i++) {
        int32_t row[BUFFER_FIELDS];
        memcpy(row, table->data + sizeof row * i, sizeof row);
        for (int side = 0; side < 3; side++)
            if (row[side] < 1 || row[side] > MAX_SIDE) return "a buffer has an impossible size";
        if ((int64_t)row[0] * row[1] * row[2] > MAX_NUMEL) return "a buffer is too large";
        if (row[3] < 0 || row[3] >= NUM_TYPES || row[4] < 0 || row[4] >= n->num_buffers) return "a buffer is damaged";
        struct buffer *b = n->buffers + i;
        *b = (struct buffer){row[0], row[1], row[2], (row[2] + WORD - 1) / WORD, 0, (enum type)row[3], row[4]};
        b->pixel_bytes = b->type == SIGNS ? 8 * b->words : 4 * b->channels;
        if (b->slot >= n->num_slots) n->num_slots = b->slot + 1;
    }
    return 0;
}

static int has_shape(const struct packed_network *n, int index, const char *dtype, int64_t numel) {
    return index >= 0 && index < n->num_tensors && n->tensors[index].data && !strcmp(n->tensors[index].dtype, dtype) &&
           n->tensors[index].numel == numel;
}

static int same_size(const struct buffer *a, const struct buffer *b) {
    return a->height == b->height && a->width == b->width && a->channels == b->channels;
}

/* Comparisons of sums must not overflow. */
static int are_thresholds(const struct packed_network *n, const struct operation *o) {
    const int32_t *threshold = (const int32_t *)n->tensors[o->fields[FACTOR]].data;
    const int32_t *direction = (const int32_t *)n->tensors[o->fields[OFFSET]].data;
    for (int64_t c = 0; c < o->target->channels; c++)
        if ((direction[c] != 1 && direction[c] != -1) || threshold[c] > MAX_THRESHOLD || threshold[c] < -MAX_THRESHOLD) return 0;
    return 1;
}

static int holds(const struct packed_network *n, const struct buffer *b) { return n->holders[b->slot] == b - n->buffers + 1; }

static int in(int32_t value, int32_t least, int32_t most) { return value >= least && value <= most; }

/* Return what is wrong with an operation, or 0. */
static const char *check_operation(const struct packed_network *n, const struct operation *o) {
    const int32_t *f = o->fields;
    const struct buffer *s = o->source, *t = o->target;
    const enum kind kind = (enum kind)f[KIND];
    const int is_conv = kind == CONV || kind == BINARY_CONV, is_pool = kind == MAX_POOL || kind == AVG_POOL;
    const int64_t taps = is_conv || is_pool ? (int64_t)f[KERNEL_H] * f[KERNEL_W] : 1;
    int takes[NUM_TYPES] = {0}, gives[NUM_TYPES] = {0};
    takes[FLOATS] = kind != BINARY_CONV && kind != THRESHOLD;
    takes[SIGNS] = kind == BINARY_CONV;
    takes[SUMS] = kind == THRESHOLD || kind == AFFINE || kind == LAYER_NORM || kind == MAX_POOL;
    gives[FLOATS] = kind != SIGN && kind != THRESHOLD;
    gives[SIGNS] = kind == SIGN || kind == THRESHOLD || kind == BINARY_CONV;
    gives[SUMS] = kind == BINARY_CONV || kind == MAX_POOL;
    if (!takes[s->type] || !gives[t->type] || (kind == MAX_POOL && s->type != t->type)) return "buffers have other types";
    if (s->slot == t->slot) return "it overwrites its input"; /* what it adds may be: pixel by pixel it is read first */
    if (is_conv || is_pool) {
        if (!in(f[KERNEL_H], 1, 1 << 12) || !in(f[KERNEL_W], 1, 1 << 12) || !in(f[STRIDE], 1, 1 << 12)) return "its window is damaged";
        if (!in(f[TOP], 0, f[KERNEL_H] - 1) || !in(f[LEFT], 0, f[KERNEL_W] - 1)) return "its padding is damaged";
        /* Every window has a pixel of the image. */
        if ((t->height - 1) * f[STRIDE] - f[TOP] >= s->height || (t->width - 1) * f[STRIDE] - f[LEFT] >= s->width)
            return "its output is larger than its input allows";
        if (((t->height - 1) * f[STRIDE] + f[KERNEL_H]) * ((t->width - 1) * f[STRIDE] + f[KERNEL_W]) * s->channels > MAX_NUMEL)
            return "its padded input is too large";
        if (is_pool && s->channels != t->channels) return "it changes the number of channels";
    } else if (kind == MEAN) {
        if (t->height != 1 || t->width != 1 || t->channels != s->channels) return "its sizes are wrong";
    } else if (!same_size(s, t)) {
        return "its sizes differ";
    }
    if (is_conv) {
        const int64_t numel = taps * s->channels * t->channels;
        if (taps * s->channels > (int64_t)1 << 24 || numel > MAX_NUMEL) return "its weight is too large";
        const int is_binary = kind == BINARY_CONV || f[FLAGS] & BINARY_WEIGHT;
        if (is_binary ? !has_shape(n, f[WEIGHT], "U8", (numel + 7) / 8) : !has_shape(n, f[WEIGHT], "F32", numel))
            return "its weight has another size";
    }
    const int needs_pair = kind == NORMALIZE || (kind == THRESHOLD || (kind == BINARY_CONV && t->type == SIGNS));
    if (needs_pair && (f[FACTOR] < 0 || f[OFFSET] < 0)) return "a tensor is missing";
    const char *dtype = t->type == SIGNS ? "I32" : "F32";
    if (f[FACTOR] != -1 && !has_shape(n, f[FACTOR], dtype, t->channels)) return "its factors have another size";
    if (f[OFFSET] != -1 && !has_shape(n, f[OFFSET], dtype, t->channels)) return "its offsets have another size";
    if (needs_pair && t->type == SIGNS && !are_thresholds(n, o)) return "its thresholds are damaged";
    if (kind == ADD && !o->other) return "it has one input";
    if (o->other && (o->other->type != FLOATS || t->type != FLOATS || !same_size(o->other, t))) return "what it adds has another size";
    if (o->other && kind != ADD && kind != CONV && kind != BINARY_CONV && kind != AFFINE) return "it cannot add";
    if (o->signs && (o->signs->type != SIGNS || t->type != FLOATS || !same_size(o->signs, t) || o->signs->slot == t->slot ||
                     o->signs->slot == s->slot || (o->other && o->signs->slot == o->other->slot)))
        return "its signs have another size";
    if ((kind != NORMALIZE && !holds(n, s)) || (o->other && !holds(n, o->other))) return "it reads what no operation has written";
    return 0;
}

static int64_t work_of(const struct operation *o) {
    const int32_t *f = o->fields;
    const struct buffer *s = o->source, *t = o->target;
    const int64_t results = t->height * t->width * t->channels, taps = (int64_t)f[KERNEL_H] * f[KERNEL_W];
    if (f[KIND] == MAX_POOL || f[KIND] == AVG_POOL) return results * taps;
    if (f[KIND] != CONV && f[KIND] != BINARY_CONV) return s->height * s->width * s->channels;
    const int64_t rows = (t->height - 1) * f[STRIDE] + f[KERNEL_H], columns = (t->width - 1) * f[STRIDE] + f[KERNEL_W];
    return (results * taps + rows * columns) * (f[KIND] == CONV ? s->channels : s->words);
}

static const char *read_operations(struct packed_network *n, const struct tensor *table) {
    if (!is_table(table, FIELDS)) return "its program is damaged";
    n->num_operations = (int)table->shape[0];
    n->operations = calloc(n->num_operations, sizeof *n->operations);
    n->seconds = calloc(n->num_operations, sizeof *n->seconds);
    n->holders = calloc(n->num_slots, sizeof *n->holders);
    if (!n->operations || !n->seconds || !n->holders) return "there is not enough memory";
    for (int i = 0; i < n->num_operations; i++) {
        struct operation *o = n->operations + i;
        const int32_t *f = o->fields;
        memcpy(o->fields, table->data + sizeof o->fields * i, sizeof o->fields);
        if (f[KIND] < 0 || f[KIND] >= NUM_KINDS) return "it has an operation of a later version";
        if (f[SOURCE] < 0 || f[SOURCE] >= n->num_buffers || f[TARGET_BUFFER] < 0 || f[TARGET_BUFFER] >= n->num_buffers ||
            f[OTHER] < -1 || f[OTHER] >= n->num_buffers || f[SIGNS_OF] < -1 || f[SIGNS_OF] >= n->num_buffers)
            return "an operation has no buffer";
        o->source = n->buffers + f[SOURCE];
        o->target = n->buffers + f[TARGET_BUFFER];
        o->other = f[OTHER] < 0 ? 0 : n->buffers + f[OTHER];
        o->signs = f[SIGNS_OF] < 0 ? 0 : n->buffers + f[SIGNS_OF];
        if ((f[KIND] == NORMALIZE) != (i == 0)) return "the image is not normalized first";
        const char *wrong = check_operation(n, o);
        if (wrong) return wrong;
        o->work = work_of(o);
        n->work += o->work;
        if (n->work > MAX_WORK) return "it needs too much work for an image";
        n->holders[o->target->slot] = f[TARGET_BUFFER] + 1;
        if (o->signs) n->holders[o->signs->slot] = f[SIGNS_OF] + 1;
        const void *factor = f[FACTOR] < 0 ? 0 : n->tensors[f[FACTOR]].data, *offset = f[OFFSET] < 0 ? 0 : n->tensors[f[OFFSET]].data;
        if (o->target->type == SIGNS)
            o->threshold = factor, o->direction = offset;
        else
            o->factor = factor, o->offset = offset;
    }
    const struct buffer *last = n->operations[n->num_operations - 1].target;
    if (last->type != FLOATS || last->height != 1 || last->width != 1) return "its result is not a row of logits";
    return 0;
}

/* ---- Weights in the order of the inner loops ---- */

static int bit_of(const unsigned char *bits, int64_t index) { return bits[index / 8] >> (index % 8) & 1; }

static int64_t rounded_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

/* File: [taps][channels][outputs] floats or signs. Memory: [outputs / wide][taps][channels][wide]. */
static int prepare_floats(struct packed_network *n, struct operation *o) {
    const int64_t wide = n->path->dot_wide, taps = (int64_t)o->fields[KERNEL_H] * o->fields[KERNEL_W];
    const int64_t outputs = o->target->channels, depth = taps * o->source->channels;
    const unsigned char *data = n->tensors[o->fields[WEIGHT]].data;
    if (!reserve(n, rounded_up(outputs, wide) * depth * (int64_t)sizeof(float))) return 0;
    float *weight = calloc(rounded_up(outputs, wide) * depth, sizeof *weight);
    if (!weight) return 0;
    for (int64_t k = 0; k < depth; k++)
        for (int64_t output = 0; output < outputs; output++) {
            const int64_t from = k * outputs + output;
            weight[(output / wide * depth + k) * wide + output % wide] =
                o->fields[FLAGS] & BINARY_WEIGHT ? (bit_of(data, from) ? 1.0f : -1.0f) : ((const float *)data)[from];
        }
    o->weight = weight;
    return 1;
}

/* File: [outputs][taps][channels] signs. Memory: [outputs / wide][taps][words][wide]. */
static int prepare_bits(struct packed_network *n, struct operation *o) {
    const int64_t wide = n->path->differ_wide, taps = (int64_t)o->fields[KERNEL_H] * o->fields[KERNEL_W];
    const int64_t outputs = o->target->channels, channels = o->source->channels, words = o->source->words;
    const unsigned char *data = n->tensors[o->fields[WEIGHT]].data;
    if (!reserve(n, rounded_up(outputs, wide) * taps * words * 8 + taps * outputs * 4)) return 0;
    uint64_t *weight = calloc(rounded_up(outputs, wide) * taps * words, sizeof *weight);
    o->ones = calloc(taps * outputs, sizeof *o->ones);
    o->weight = weight;
    if (!weight || !o->ones) return 0;
    for (int64_t output = 0; output < outputs; output++)
        for (int64_t tap = 0; tap < taps; tap++)
            for (int64_t c = 0; c < channels; c++) {
                if (!bit_of(data, (output * taps + tap) * channels + c)) continue;
                weight[((output / wide * taps + tap) * words + c / WORD) * wide + output % wide] |= (uint64_t)1 << (c % WORD);
                o->ones[tap * outputs + output]++;
            }
    return 1;
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
        free(n->operations[i].ones);
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
        n->slots[slot] = reserve(n, most) ? calloc(most, 1) : 0;
        if (!n->slots[slot]) return "it needs more memory than there is, or than 1 GiB";
    }
    n->padded = reserve(n, n->padded_bytes + n->scratch_bytes) ? calloc(n->padded_bytes + 64, 1) : 0;
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
typedef void differ_function(int64_t, const uint64_t *, int64_t, int64_t, const uint64_t *, int64_t, int64_t, int64_t, int32_t *);
typedef uint64_t mask_function(const float *);
struct epilogue;
typedef void fused_function(int64_t, const uint64_t *, int64_t, int64_t, const uint64_t *, int64_t, int64_t, int64_t,
                            const struct epilogue *);

static void *values_of(const struct packed_network *n, const struct buffer *b) { return n->slots[b->slot]; }

/* Words whose bits are 1 where a value is not negative; torch's sign of a NaN counts as +1. `mask` has the bits of 64 values that
 * are. */
INLINE void pack(const float *values, int64_t num, uint64_t *bits, mask_function *mask) {
    int64_t c = 0;
    for (; c + WORD <= num; c += WORD) bits[c / WORD] = ~mask(values + c);
    if (c == num) return;
    float rest[WORD];
    for (int i = 0; i < WORD; i++) rest[i] = c + i < num ? values[c + i] : -1.0f;
    bits[c / WORD] = ~mask(rest);
}

/* Set bits of the taps of a pixel that lie on padding, whose bits are 0 and look like -1: they are no products. */
INLINE int32_t correct_border(const struct operation *o, int64_t y, int64_t x, int64_t first, int64_t num, int32_t *differing) {
    const struct buffer *s = o->source;
    const int64_t top = y * o->fields[STRIDE] - o->fields[TOP], left = x * o->fields[STRIDE] - o->fields[LEFT];
    const int64_t kernel_h = o->fields[KERNEL_H], kernel_w = o->fields[KERNEL_W], outputs = o->target->channels;
    int64_t num_products = kernel_h * kernel_w * s->channels;
    if (top >= 0 && left >= 0 && top + kernel_h <= s->height && left + kernel_w <= s->width) return (int32_t)num_products;
    for (int64_t i = 0; i < kernel_h; i++)
        for (int64_t j = 0; j < kernel_w; j++) {
            if (top + i >= 0 && top + i < s->height && left + j >= 0 && left + j < s->width) continue;
            const int32_t *ones = o->ones + (i * kernel_w + j) * outputs + first;
            num_products -= s->channels;
            for (int64_t c = 0; c < num; c++) differing[c] -= ones[c];
        }
    return (int32_t)num_products;
}

/* Factor, offset, what is added, ReLU of up to 64 channels, in the order of torch's operators, each rounded. */
INLINE void finish_word(const struct operation *o, float *restrict word, const float *restrict added, int64_t first, const int64_t num) {
    const float *restrict factor = o->factor ? o->factor + first : 0, *restrict offset = o->offset ? o->offset + first : 0;
    if (factor)
        for (int64_t c = 0; c < num; c++) word[c] *= factor[c];
    if (offset)
        for (int64_t c = 0; c < num; c++) word[c] += offset[c];
    if (added)
        for (int64_t c = 0; c < num; c++) word[c] += added[c];
    if (o->fields[FLAGS] & RELU)
        for (int64_t c = 0; c < num; c++) word[c] = word[c] < 0.0f ? 0.0f : word[c];
}

/* Up to 64 values of a pixel: floats, or sums of `num_products` signs of which `differing` are -1. */
INLINE void take_word(float *restrict word, const float *values, const int32_t *differing, int32_t num_products, const int64_t num) {
    if (differing)
        for (int64_t c = 0; c < num; c++) word[c] = (float)(num_products - 2 * differing[c]);
    else
        memcpy(word, values, num * sizeof *word);
}

/* A pixel of FLOATS from `values`, or from `differing`. `added` and `bits` may be NULL. */
INLINE void finish(const struct operation *o, const float *values, const int32_t *differing, int32_t num_products, const float *added,
                   int64_t first, int64_t num, float *out, uint64_t *bits, mask_function *mask) {
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
        if (bits) pack(word, most, bits + c / WORD, mask);
    }
}

/* Both sides are below 2^24 or beyond every sum, so floats hold them. */
INLINE void compare(const struct operation *o, const int32_t *sums, int64_t first, int64_t num, uint64_t *bits, mask_function *mask) {
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

/* Outputs `first` to `first + num` of the pixels `begin` to `end` of row y; `first` is a multiple of 64. */
INLINE void convolve_pixels(struct packed_network *n, const struct operation *o, int64_t y, int64_t begin, int64_t end, int64_t first,
                            int64_t num, const struct row *row, const int64_t wide, dot_function *dot, differ_function *differ,
                            mask_function *mask) {
    const struct buffer *t = o->target;
    const int64_t padded = (num + wide - 1) / wide * wide;
    const int is_binary = o->fields[KIND] == BINARY_CONV;
    const float *added = o->other ? (const float *)values_of(n, o->other) : 0;
    if (begin >= end) return;
    if (is_binary)
        differ(end - begin, (const uint64_t *)row->source + begin * row->step, o->row_values, row->step, row->weight,
               o->fields[KERNEL_H], row->run, num, (int32_t *)row->scratch);
    else
        dot(end - begin, (const float *)row->source + begin * row->step, o->row_values, row->step, row->weight, o->fields[KERNEL_H],
            row->run, num, row->scratch);
    for (int64_t x = begin; x < end; x++) {
        const int64_t pixel = y * t->width + x, to = pixel * t->channels + first;
        const float *values = row->scratch + (x - begin) * padded;
        int32_t *sums = is_binary ? (int32_t *)row->scratch + (x - begin) * padded : 0, num_products = 0;
        if (is_binary) {
            num_products = correct_border(o, y, x, first, num, sums);
            if (t->type != FLOATS)
                for (int64_t c = 0; c < num; c++) sums[c] = num_products - 2 * sums[c];
            if (n->traced_sums && n->operations + n->traced == o)
                for (int64_t c = 0; c < num; c++) n->traced_sums[to + c] = t->type == FLOATS ? num_products - 2 * sums[c] : sums[c];
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

/* The last steps of pixels without a detour through memory: for FLOATS of whole words of channels. Pointers are those of the first
 * pixel and of output `first`. */
struct epilogue {
    const float *factor, *offset, *added;
    const int32_t *correction; /* of differing bits at a border, or NULL */
    float *out;
    uint64_t *bits;
    int64_t channels, words;
    int32_t num_products;
    int has_relu;
};

/* Pixels `begin` to `end` of row y, which lack the same taps. */
INLINE void fuse_pixels(struct packed_network *n, const struct operation *o, int64_t y, int64_t begin, int64_t end, int64_t first,
                        int64_t num, const struct row *row, fused_function *fused) {
    const struct buffer *t = o->target;
    const int64_t pixel = y * t->width + begin, to = pixel * t->channels + first;
    const int32_t all = (int32_t)(o->fields[KERNEL_H] * o->fields[KERNEL_W] * o->source->channels);
    int32_t *correction = (int32_t *)row->scratch;
    if (begin >= end) return;
    memset(correction, 0, num * sizeof *correction);
    const int32_t num_products = correct_border(o, y, begin, first, num, correction);
    const struct epilogue e = {
        .factor = o->factor ? o->factor + first : 0,
        .offset = o->offset ? o->offset + first : 0,
        .added = o->other ? (const float *)values_of(n, o->other) + to : 0,
        .correction = num_products == all ? 0 : correction,
        .out = (float *)values_of(n, t) + to,
        .bits = o->signs ? (uint64_t *)values_of(n, o->signs) + pixel * t->words + first / WORD : 0,
        .channels = t->channels,
        .words = t->words,
        .num_products = num_products,
        .has_relu = o->fields[FLAGS] & RELU,
    };
    fused(end - begin, (const uint64_t *)row->source + begin * row->step, o->row_values, row->step, row->weight, o->fields[KERNEL_H],
          row->run, num, &e);
}

/* Row y of a convolution; `fused` is NULL where an instruction set has none. */
INLINE void convolve_row(struct packed_network *n, const struct operation *o, int64_t y, int64_t first, int64_t num, void *scratch,
                         const int64_t wide, dot_function *dot, differ_function *differ, fused_function *fused, mask_function *mask) {
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
    if (!fused || !is_binary || t->type != FLOATS || n->traced_sums || num % WORD) {
        convolve_pixels(n, o, y, 0, t->width, first, num, &row, wide, dot, differ, mask);
        return;
    }
    const int64_t before = (f[LEFT] + f[STRIDE] - 1) / f[STRIDE], inside = (s->width + f[LEFT] - f[KERNEL_W]) / f[STRIDE] + 1;
    const int64_t begin = before < t->width ? before : t->width, end = inside < begin ? begin : inside < t->width ? inside : t->width;
    for (int64_t x = 0; x < begin; x++) fuse_pixels(n, o, y, x, x + 1, first, num, &row, fused);
    fuse_pixels(n, o, y, begin, end, first, num, &row, fused);
    for (int64_t x = end; x < t->width; x++) fuse_pixels(n, o, y, x, x + 1, first, num, &row, fused);
}

INLINE void normalize_pixel(const struct packed_network *n, const struct operation *o, float *values) {
    double mean = 0, variance = 0;
    float epsilon;
    const int64_t num = o->source->channels;
    (void)n;
    memcpy(&epsilon, &o->fields[REAL], sizeof epsilon);
    for (int64_t c = 0; c < num; c++) mean += values[c];
    mean /= (double)num;
    for (int64_t c = 0; c < num; c++) variance += (values[c] - mean) * (values[c] - mean);
    const float scale = (float)(1.0 / sqrt(variance / (double)num + epsilon)), center = (float)mean;
    for (int64_t c = 0; c < num; c++) values[c] = (values[c] - center) * scale;
}

INLINE void pool_pixel(struct packed_network *n, const struct operation *o, int64_t y, int64_t x) {
    const struct buffer *s = o->source, *t = o->target;
    const int64_t top = y * o->fields[STRIDE] - o->fields[TOP], left = x * o->fields[STRIDE] - o->fields[LEFT], channels = s->channels;
    const int64_t y0 = top > 0 ? top : 0, y1 = top + o->fields[KERNEL_H] < s->height ? top + o->fields[KERNEL_H] : s->height;
    const int64_t x0 = left > 0 ? left : 0, x1 = left + o->fields[KERNEL_W] < s->width ? left + o->fields[KERNEL_W] : s->width;
    float *restrict out = (float *)values_of(n, t) + (y * t->width + x) * channels;
    int32_t *best = (int32_t *)out;
    for (int64_t i = y0; i < y1; i++)
        for (int64_t j = x0; j < x1; j++) {
            const float *restrict in = (const float *)values_of(n, s) + (i * s->width + j) * channels;
            const int32_t *sums = (const int32_t *)in;
            if (i == y0 && j == x0)
                memcpy(out, in, channels * sizeof *out);
            else if (o->fields[KIND] == AVG_POOL)
                for (int64_t c = 0; c < channels; c++) out[c] += in[c];
            else if (s->type == SUMS)
                for (int64_t c = 0; c < channels; c++) best[c] = best[c] > sums[c] ? best[c] : sums[c];
            else
                for (int64_t c = 0; c < channels; c++) out[c] = in[c] <= out[c] ? out[c] : in[c];
        }
    const float count = (float)((y1 - y0) * (x1 - x0));
    if (o->fields[KIND] == AVG_POOL)
        for (int64_t c = 0; c < channels; c++) out[c] /= count;
}

/* Row y of any other operation. */
INLINE void map_row(struct packed_network *n, const struct operation *o, int64_t y, mask_function *mask) {
    const struct buffer *s = o->source, *t = o->target;
    const int64_t num = s->channels, row = y * s->width * num;
    if (o->fields[KIND] == NORMALIZE) {
        const int64_t numel = s->width * num;
        const float *mean = o->weight, *deviation = mean + numel;
        float *out = (float *)values_of(n, t) + row;
        if (n->pixel_kind == PACKED_UINT8)
            for (int64_t i = 0; i < numel; i++) out[i] = ((float)((const uint8_t *)n->pixels)[row + i] - mean[i]) / deviation[i];
        else
            for (int64_t i = 0; i < numel; i++) out[i] = (((const float *)n->pixels)[row + i] - mean[i]) / deviation[i];
        for (int64_t x = 0; o->signs && x < s->width; x++)
            pack(out + x * num, num, (uint64_t *)values_of(n, o->signs) + (y * s->width + x) * t->words, mask);
        return;
    }
    for (int64_t x = 0; x < t->width; x++) {
        const int64_t pixel = y * t->width + x, at = pixel * num;
        float *out = (float *)values_of(n, t) + (t->type == FLOATS ? at : 0);
        const float *in = (const float *)values_of(n, s) + at, *added = o->other ? (const float *)values_of(n, o->other) + at : 0;
        const int32_t *sums = (const int32_t *)in;
        uint64_t *bits = (uint64_t *)values_of(n, t) + pixel * t->words;
        uint64_t *signs = o->signs ? (uint64_t *)values_of(n, o->signs) + pixel * t->words : 0;
        switch (o->fields[KIND]) {
        case MAX_POOL:
        case AVG_POOL:
            pool_pixel(n, o, y, x);
            if (signs) pack(out, num, signs, mask);
            break;
        case SIGN:
            pack(in, num, bits, mask);
            break;
        case THRESHOLD:
            compare(o, sums, 0, num, bits, mask);
            break;
        default: /* AFFINE, LAYER_NORM, ADD */
            if (s->type == SUMS)
                for (int64_t c = 0; c < num; c++) out[c] = (float)sums[c];
            else if (o->fields[KIND] == LAYER_NORM)
                memmove(out, in, num * sizeof *out);
            if (o->fields[KIND] == LAYER_NORM) normalize_pixel(n, o, out);
            finish(o, s->type == SUMS || o->fields[KIND] == LAYER_NORM ? out : in, 0, 0, added, 0, num, out, signs, mask);
        }
    }
}

/* ---- Instruction sets ---- */

#define NAME(x) x##_portable
#define TARGET
#define COUNT_PIXELS 4
#define COUNT_VECTORS 1
#define DOT_PIXELS 4
#define DOT_VECTORS 2
#define VF 4
typedef float v4 __attribute__((vector_size(16), aligned(4)));
#define vf v4
#define LOADF(p) (*(const v4 *)(p))
#define STOREF(p, v) (*(v4 *)(p) = (v))
#define SPLATF(x) ((v4){(x), (x), (x), (x)})
#define FMAF(a, b, c) ((a) * (b) + (c))
INLINE uint64_t mask_portable(const float *values) {
    uint64_t mask = 0;
    for (int i = 0; i < WORD; i++) mask |= (uint64_t)(values[i] < 0.0f) << i;
    return mask;
}
INLINE void count_portable(const int num, const uint64_t *x, int64_t row_stride, int64_t step, const uint64_t *weight,
                           int64_t kernel_rows, int64_t run, int32_t *out, int64_t out_step) {
    int32_t sums[COUNT_PIXELS][LANES] = {{0}};
    for (int64_t i = 0; i < kernel_rows; i++)
        for (int64_t k = 0; k < run; k++, weight += LANES)
            for (int p = 0; p < num; p++)
                for (int lane = 0; lane < LANES; lane++)
                    sums[p][lane] += __builtin_popcountll(weight[lane] ^ x[i * row_stride + p * step + k]);
    for (int p = 0; p < num; p++) memcpy(out + p * out_step, sums[p], sizeof sums[p]);
}
#include "kernels.h"

#if defined __x86_64__
#define NAME(x) x##_avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vpopcntdq,fma")))
#define COUNT_PIXELS 6
#define COUNT_VECTORS 4
#define DOT_PIXELS 6
#define DOT_VECTORS 4
#define VF 16
#define vf __m512
#define LOADF(p) _mm512_loadu_ps(p)
#define STOREF(p, v) _mm512_storeu_ps(p, v)
#define SPLATF(x) _mm512_set1_ps(x)
#define FMAF(a, b, c) _mm512_fmadd_ps(a, b, c)
TARGET INLINE uint64_t mask_avx512(const float *values) {
    uint64_t mask = 0;
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        mask |= (uint64_t)_mm512_cmp_ps_mask(_mm512_loadu_ps(values + 16 * i), _mm512_setzero_ps(), _CMP_LT_OQ) << (16 * i);
    return mask;
}
/* 16 outputs from `at` of pixel `p`. */
TARGET INLINE void finish_avx512(const struct epilogue *e, int64_t p, int64_t at, __m512i differing) {
    const int64_t to = p * e->channels + at;
    if (e->correction) differing = _mm512_add_epi32(differing, _mm512_loadu_si512(e->correction + at));
    __m512 values = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_set1_epi32(e->num_products), _mm512_slli_epi32(differing, 1)));
    if (e->factor) values = _mm512_mul_ps(values, _mm512_loadu_ps(e->factor + at));
    if (e->offset) values = _mm512_add_ps(values, _mm512_loadu_ps(e->offset + at));
    if (e->added) values = _mm512_add_ps(values, _mm512_loadu_ps(e->added + to));
    const __mmask16 negative = _mm512_cmp_ps_mask(values, _mm512_setzero_ps(), _CMP_LT_OQ);
    if (e->has_relu) values = _mm512_maskz_mov_ps((__mmask16)~negative, values);
    _mm512_storeu_ps(e->out + to, values);
    const uint16_t signs = (uint16_t)(e->has_relu ? 0xffff : ~negative);
    if (e->bits) memcpy((unsigned char *)(e->bits + p * e->words) + at / 8, &signs, sizeof signs);
}
/* To `out`, or through `e`, whose first pixel is the first of these, to outputs from `at`. */
TARGET INLINE void count_or_finish(const int num, const uint64_t *x, int64_t row_stride, int64_t step, const uint64_t *weight,
                                   int64_t kernel_rows, int64_t run, int32_t *out, int64_t out_step, const struct epilogue *e,
                                   int64_t first_pixel, int64_t at) {
    __m512i sums[COUNT_PIXELS][COUNT_VECTORS];
    for (int p = 0; p < num; p++)
        for (int v = 0; v < COUNT_VECTORS; v++) sums[p][v] = _mm512_setzero_si512();
    for (int64_t i = 0; i < kernel_rows; i++) {
        const uint64_t *row = x + i * row_stride;
        for (int64_t k = 0; k < run; k++, weight += COUNT_VECTORS * LANES) {
            __m512i w[COUNT_VECTORS];
#pragma GCC unroll 4
            for (int v = 0; v < COUNT_VECTORS; v++) w[v] = _mm512_loadu_si512(weight + v * LANES);
#pragma GCC unroll 8
            for (int p = 0; p < num; p++) {
                const __m512i pixel = _mm512_set1_epi64((int64_t)row[p * step + k]);
#pragma GCC unroll 4
                for (int v = 0; v < COUNT_VECTORS; v++)
                    sums[p][v] = _mm512_add_epi64(sums[p][v], _mm512_popcnt_epi64(_mm512_xor_si512(w[v], pixel)));
            }
        }
    }
    const __m512i low = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
#pragma GCC unroll 8
    for (int p = 0; p < num; p++)
#pragma GCC unroll 4
        for (int v = 0; v < COUNT_VECTORS; v += 2) {
            const __m512i differing = _mm512_permutex2var_epi32(sums[p][v], low, sums[p][v + 1]);
            if (e)
                finish_avx512(e, first_pixel + p, at + v * LANES, differing);
            else
                _mm512_storeu_si512(out + p * out_step + v * LANES, differing);
        }
}
TARGET INLINE void count_avx512(const int num, const uint64_t *x, int64_t row_stride, int64_t step, const uint64_t *weight,
                                int64_t kernel_rows, int64_t run, int32_t *out, int64_t out_step) {
    count_or_finish(num, x, row_stride, step, weight, kernel_rows, run, out, out_step, 0, 0, 0);
}
/* `num` pixels of a row that lack the same taps, all outputs. */
TARGET static void fused_avx512(int64_t num, const uint64_t *x, int64_t row_stride, int64_t step, const uint64_t *weight,
                                int64_t kernel_rows, int64_t run, int64_t outputs, const struct epilogue *e) {
    const int64_t wide = COUNT_VECTORS * LANES;
    for (int64_t n = 0; n < outputs; n += wide, weight += kernel_rows * run * wide) {
        int64_t p = 0;
        for (; p + COUNT_PIXELS <= num; p += COUNT_PIXELS)
            count_or_finish(COUNT_PIXELS, x + p * step, row_stride, step, weight, kernel_rows, run, 0, 0, e, p, n);
        for (; p + 4 <= num; p += 4) count_or_finish(4, x + p * step, row_stride, step, weight, kernel_rows, run, 0, 0, e, p, n);
        for (; p + 2 <= num; p += 2)
            count_or_finish(2, x + p * step, row_stride, step, weight, kernel_rows, run, 0, 0, e, p, n);
        for (; p < num; p++) count_or_finish(1, x + p * step, row_stride, step, weight, kernel_rows, run, 0, 0, e, p, n);
    }
}
#define HAS_FUSED
#include "kernels.h"

#define NAME(x) x##_avx2
#define TARGET __attribute__((target("avx2,fma")))
#define COUNT_PIXELS 4
#define COUNT_VECTORS 1
#define DOT_PIXELS 6
#define DOT_VECTORS 2
#define VF 8
#define vf __m256
#define LOADF(p) _mm256_loadu_ps(p)
#define STOREF(p, v) _mm256_storeu_ps(p, v)
#define SPLATF(x) _mm256_set1_ps(x)
#define FMAF(a, b, c) _mm256_fmadd_ps(a, b, c)
TARGET INLINE uint64_t mask_avx2(const float *values) {
    uint64_t mask = 0;
    for (int i = 0; i < 8; i++) {
        const __m256 negative = _mm256_cmp_ps(_mm256_loadu_ps(values + 8 * i), _mm256_setzero_ps(), _CMP_LT_OQ);
        mask |= (uint64_t)(uint32_t)_mm256_movemask_ps(negative) << (8 * i);
    }
    return mask;
}
/* Counts in bytes, by looking up nibbles; a byte holds the counts of 31 words. */
TARGET INLINE void count_avx2(const int num, const uint64_t *x, int64_t row_stride, int64_t step, const uint64_t *weight,
                              int64_t kernel_rows, int64_t run, int32_t *out, int64_t out_step) {
    const __m256i table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
    const __m256i nibble = _mm256_set1_epi8(15), zero = _mm256_setzero_si256();
    __m256i sums[COUNT_PIXELS][2], bytes[COUNT_PIXELS][2];
    for (int p = 0; p < num; p++)
        for (int v = 0; v < 2; v++) sums[p][v] = bytes[p][v] = zero;
    int words = 0;
    for (int64_t i = 0; i < kernel_rows; i++) {
        const uint64_t *row = x + i * row_stride;
        for (int64_t k = 0; k < run; k++, weight += LANES) {
            for (int v = 0; v < 2; v++) {
                const __m256i w = _mm256_loadu_si256((const __m256i *)(weight + 4 * v));
#pragma GCC unroll 4
                for (int p = 0; p < num; p++) {
                    const __m256i bits = _mm256_xor_si256(w, _mm256_set1_epi64x((int64_t)row[p * step + k]));
                    const __m256i low = _mm256_shuffle_epi8(table, _mm256_and_si256(bits, nibble));
                    const __m256i high = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(bits, 4), nibble));
                    bytes[p][v] = _mm256_add_epi8(bytes[p][v], _mm256_add_epi8(low, high));
                }
            }
            if (++words < 31) continue;
            for (int p = 0; p < num; p++)
                for (int v = 0; v < 2; v++) {
                    sums[p][v] = _mm256_add_epi64(sums[p][v], _mm256_sad_epu8(bytes[p][v], zero));
                    bytes[p][v] = zero;
                }
            words = 0;
        }
    }
    for (int p = 0; p < num; p++)
        for (int v = 0; v < 2; v++) {
            int64_t lanes[4];
            _mm256_storeu_si256((__m256i *)lanes, _mm256_add_epi64(sums[p][v], _mm256_sad_epu8(bytes[p][v], zero)));
            for (int lane = 0; lane < 4; lane++) out[p * out_step + 4 * v + lane] = (int32_t)lanes[lane];
        }
}
#include "kernels.h"
#elif defined __aarch64__
#define NAME(x) x##_neon
#define TARGET
#define COUNT_PIXELS 4
#define COUNT_VECTORS 1
#define DOT_PIXELS 4
#define DOT_VECTORS 4
#define VF 4
#define vf float32x4_t
#define LOADF(p) vld1q_f32(p)
#define STOREF(p, v) vst1q_f32(p, v)
#define SPLATF(x) vdupq_n_f32(x)
#define FMAF(a, b, c) vfmaq_f32(c, a, b)
#define mask_neon mask_portable
/* Counts in bytes; a byte holds the counts of 31 words. */
INLINE void count_neon(const int num, const uint64_t *x, int64_t row_stride, int64_t step, const uint64_t *weight,
                       int64_t kernel_rows, int64_t run, int32_t *out, int64_t out_step) {
    uint64x2_t sums[COUNT_PIXELS][4];
    uint8x16_t bytes[COUNT_PIXELS][4];
    for (int p = 0; p < num; p++)
        for (int v = 0; v < 4; v++) sums[p][v] = vdupq_n_u64(0), bytes[p][v] = vdupq_n_u8(0);
    int words = 0;
    for (int64_t i = 0; i < kernel_rows; i++) {
        const uint64_t *row = x + i * row_stride;
        for (int64_t k = 0; k < run; k++, weight += LANES) {
            for (int v = 0; v < 4; v++) {
                const uint64x2_t w = vld1q_u64(weight + 2 * v);
                for (int p = 0; p < num; p++)
                    bytes[p][v] = vaddq_u8(bytes[p][v], vcntq_u8(vreinterpretq_u8_u64(veorq_u64(w, vdupq_n_u64(row[p * step + k])))));
            }
            if (++words < 31) continue;
            for (int p = 0; p < num; p++)
                for (int v = 0; v < 4; v++) {
                    sums[p][v] = vpadalq_u32(sums[p][v], vpaddlq_u16(vpaddlq_u8(bytes[p][v])));
                    bytes[p][v] = vdupq_n_u8(0);
                }
            words = 0;
        }
    }
    for (int p = 0; p < num; p++)
        for (int v = 0; v < 4; v++) {
            const uint64x2_t sum = vpadalq_u32(sums[p][v], vpaddlq_u16(vpaddlq_u8(bytes[p][v])));
            vst1_s32(out + p * out_step + 2 * v, vreinterpret_s32_u32(vmovn_u64(sum)));
        }
}
#include "kernels.h"
#endif

static const struct path PATHS[] = {
#if defined __x86_64__
    {"avx512", 64, 32, convolve_row_avx512, map_row_avx512},
    {"avx2", 16, 8, convolve_row_avx2, map_row_avx2},
#elif defined __aarch64__
    {"neon", 16, 8, convolve_row_neon, map_row_neon},
#endif
    {"portable", 8, 8, convolve_row_portable, map_row_portable},
};
enum { NUM_PATHS = sizeof PATHS / sizeof *PATHS };
static const struct path *_Atomic chosen;

static int is_supported(const struct path *path) {
#if defined __x86_64__
    if (!strcmp(path->name, "avx512"))
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("fma");
    if (!strcmp(path->name, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    (void)path;
    return 1;
}

static const struct path *current_path(void) {
    const struct path *path = chosen;
    if (path) return path;
    for (int i = 0; i < NUM_PATHS; i++)
        if (is_supported(PATHS + i)) return PATHS + i;
    return PATHS + NUM_PATHS - 1;
}

int packed_use_path(const char *name) {
    if (!name) {
        chosen = NULL;
        return 0;
    }
    for (int i = 0; i < NUM_PATHS; i++)
        if (!strcmp(PATHS[i].name, name) && is_supported(PATHS + i)) {
            chosen = PATHS + i;
            return 0;
        }
    return -1;
}

const char *packed_path(void) { return current_path()->name; }

/* ---- Running ---- */

/* A pixel of the source with zeros around it, at the start of `row`. */
static void pad_row(const struct packed_network *n, const struct operation *o, int64_t row) {
    const struct buffer *s = o->source;
    const int64_t top = o->fields[TOP], left = o->fields[LEFT], value = o->fields[KIND] == CONV ? 4 : 8;
    const int64_t pixel = s->pixel_bytes, bytes = o->row_values * value;
    unsigned char *to = n->padded + row * bytes;
    if (row < top || row - top >= s->height) {
        memset(to, 0, bytes);
        return;
    }
    int64_t copied = s->width * pixel;
    if (copied > bytes - left * pixel) copied = bytes - left * pixel;
    memset(to, 0, left * pixel);
    memcpy(to + left * pixel, (unsigned char *)values_of(n, s) + (row - top) * s->width * pixel, copied);
    memset(to + left * pixel + copied, 0, bytes - left * pixel - copied);
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
            const int64_t part = task % parts, first = blocks * part / parts * WORD, last = blocks * (part + 1) / parts * WORD;
            n->path->convolve_row(n, o, task / parts, first, (last < t->channels ? last : t->channels) - first, scratch);
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
    if (o->signs) pack(out, channels, values_of(n, o->signs), mask_portable);
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

int packed_num_classes(const struct packed_network *n) { return (int)n->operations[n->num_operations - 1].target->channels; }

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

int packed_sums(struct packed_network *n, const void *pixels, enum packed_pixels kind, int index, int32_t *sums, int num_threads) {
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
