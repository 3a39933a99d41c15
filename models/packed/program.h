/* Read a packed program file and check it, for packed.c.
 *
 * The file is safetensors: 8 bytes with the length of a JSON header, the header, then tensors.
 * "program" (int32 [operations] [FIELDS]) lists the operations and "buffers" (int32
 * [buffers][BUFFER_FIELDS]) the images between them; the others, "0", "1", ..., hold weights.
 * Everything that an operation reads or writes is checked here, so running needs no checks. */
#include "json.h"
#include "packed.h"

#include <stdlib.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "numbers of a file are used as they lie");

enum {
    FORMAT = 1, WORD = 64, LANES = 8, FIELDS = 20, BUFFER_FIELDS = 5, MAX_TENSORS = 4096, MAX_SIDE = 1 << 15,
    MAX_THRESHOLD = 1 << 30
};
static const int64_t MAX_NUMEL = (int64_t)1 << 28;
/* Bytes of the file, weights and images; a file of a few kB may ask for any number. */
static const int64_t MAX_MEMORY = (int64_t)1 << 30;
/* Comparisons of words, products of floats and values that pools and maps read, for an image: about
 * a minute at worst. */
static const int64_t MAX_WORK = (int64_t)1 << 36;

enum type { FLOATS, SIGNS, SUMS, NUM_TYPES };
enum kind {
    NORMALIZE, CONV, BINARY_CONV, AFFINE, LAYER_NORM, MAX_POOL, AVG_POOL, SIGN, THRESHOLD, MEAN, ADD, DEPTHWISE,
    CONCAT, SIGMOID, SCALE, NUM_KINDS
};
/* RELU_FIRST: before factor and offset. PAD_ONES: a binary convolution pads with +1, and all its
 * products count. COUNT_PADDING: AVG_POOL counts zeros outside of the image. */
enum flags { RELU = 1, BINARY_WEIGHT = 2, RELU_FIRST = 4, PAD_ONES = 8, COUNT_PADDING = 16 };
/* Fields of an operation; -1 for a buffer or tensor that it does not have. FACTOR and OFFSET: of a
 * channel; thresholds and their directions where the target is signs; deviation and mean of
 * NORMALIZE; the OFFSET of SIGN is added before the sign. REAL: bits of a float, the epsilon of
 * LAYER_NORM. SIGNS_OF: a buffer for the signs of the result, which are packed along the way, after
 * SIGN_SHIFT is added. What happens to a result of floats: RELU_FIRST, FACTOR, OFFSET, OTHER, SHIFT,
 * RELU, SLOPE of negative values, AFTER. */
enum field {
    KIND, SOURCE, OTHER, TARGET_BUFFER, KERNEL_H, KERNEL_W, STRIDE, TOP, LEFT, FLAGS, WEIGHT, FACTOR, OFFSET, REAL,
    SIGNS_OF, SHIFT, SLOPE, AFTER, SIGN_SHIFT
};

struct packed_network;
struct operation;

/* The functions of an instruction set. */
struct path {
    const char *name;
    int dot_wide, differ_wide; /* outputs of a block of weights */
    int word_parts;            /* 2: the words of a block are halves, the lower ones of all outputs first */
    void (*convolve_row)(struct packed_network *, const struct operation *, int64_t y, int64_t first, int64_t num,
                         void *scratch);
    void (*map_row)(struct packed_network *, const struct operation *, int64_t y);
};

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
    int64_t row_values; /* of a padded row of the source, in words or floats */
    int64_t work;
    int is_padded;
    void *weight; /* in blocks of the path; NORMALIZE: means and deviations of a row */
    /* Binary convolution. Rows whose windows lack the same taps have one place, and so have columns. */
    int32_t *row_place, *column_place; /* [height], [width] of the target */
    int32_t whole_row, whole_column;   /* places that lack no tap, or -1 */
    int64_t num_columns;               /* places of columns */
    int32_t *num_products;             /* [row place][column place]: products of a window */
    float *shifted_products;           /* 2^24 + num_products */
    int32_t *correction;               /* [row place][column place][outputs]: minus the set bits of lacking taps */
    const float *factor, *offset, *shift, *slope, *after, *sign_shift;
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
        if (size > sizeof key || strcmp(key, "bitfleet")) continue;
        if (n->description) return 0; /* there twice */
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
    if (offsets[0] > offsets[1] || offsets[1] > num_bytes ||
        offsets[1] - offsets[0] != tensor->numel * size_of(tensor->dtype))
        return 0;
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

static const char *read_header(struct packed_network *n, int64_t num_bytes, struct tensor *program,
                               struct tensor *buffers) {
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
        if ((direction[c] != 1 && direction[c] != -1) || threshold[c] > MAX_THRESHOLD || threshold[c] < -MAX_THRESHOLD)
            return 0;
    return 1;
}

static int holds(const struct packed_network *n, const struct buffer *b) {
    return n->holders[b->slot] == b - n->buffers + 1;
}

static int in(int32_t value, int32_t least, int32_t most) { return value >= least && value <= most; }

static int is_absent(const struct operation *o, enum field field) { return o->fields[field] == -1; }

/* A tensor per channel of the target, or none. */
static int is_per_channel(const struct packed_network *n, const struct operation *o, enum field field,
                          const char *dtype) {
    return is_absent(o, field) || has_shape(n, o->fields[field], dtype, o->target->channels);
}

static const char *check_types(const struct operation *o) {
    const enum kind kind = (enum kind)o->fields[KIND];
    const struct buffer *s = o->source, *t = o->target;
    int takes[NUM_TYPES] = {0}, gives[NUM_TYPES] = {0};
    takes[FLOATS] = kind != BINARY_CONV && kind != THRESHOLD;
    takes[SIGNS] = kind == BINARY_CONV;
    takes[SUMS] = kind == THRESHOLD || kind == AFFINE || kind == LAYER_NORM || kind == MAX_POOL || kind == SCALE;
    gives[FLOATS] = kind != SIGN && kind != THRESHOLD;
    gives[SIGNS] = kind == SIGN || kind == THRESHOLD || kind == BINARY_CONV;
    gives[SUMS] = kind == BINARY_CONV || kind == MAX_POOL;
    if (!takes[s->type] || !gives[t->type] || (kind == MAX_POOL && s->type != t->type))
        return "buffers have other types";
    return 0;
}

static const char *check_sizes(const struct operation *o) {
    const int32_t *f = o->fields;
    const struct buffer *s = o->source, *t = o->target;
    const enum kind kind = (enum kind)f[KIND];
    const int keeps_channels = kind == MAX_POOL || kind == AVG_POOL || kind == DEPTHWISE;
    if (keeps_channels || kind == CONV || kind == BINARY_CONV) {
        if (!in(f[KERNEL_H], 1, 1 << 12) || !in(f[KERNEL_W], 1, 1 << 12) || !in(f[STRIDE], 1, 1 << 12))
            return "its window is damaged";
        if (!in(f[TOP], 0, f[KERNEL_H] - 1) || !in(f[LEFT], 0, f[KERNEL_W] - 1)) return "its padding is damaged";
        /* Every window has a pixel of the image. */
        if ((t->height - 1) * f[STRIDE] - f[TOP] >= s->height || (t->width - 1) * f[STRIDE] - f[LEFT] >= s->width)
            return "its output is larger than its input allows";
        if (((t->height - 1) * f[STRIDE] + f[KERNEL_H]) * ((t->width - 1) * f[STRIDE] + f[KERNEL_W]) * s->channels >
            MAX_NUMEL)
            return "its padded input is too large";
        if (keeps_channels && s->channels != t->channels) return "it changes the number of channels";
    } else if (kind == MEAN) {
        if (t->height != 1 || t->width != 1 || t->channels != s->channels) return "its sizes are wrong";
    } else if (kind == CONCAT ? t->height != s->height || t->width != s->width : !same_size(s, t)) {
        return "its sizes differ";
    }
    return 0;
}

/* The second input. What it adds may be overwritten: pixel by pixel it is read first. */
static const char *check_other(const struct operation *o) {
    const struct buffer *s = o->source, *t = o->target, *other = o->other;
    const enum kind kind = (enum kind)o->fields[KIND];
    if (!other) return kind == ADD || kind == CONCAT || kind == SCALE ? "it has one input" : 0;
    if (kind == CONCAT || kind == SCALE) {
        if (other->slot == t->slot) return "it overwrites its input";
        if (other->type != FLOATS || t->type != FLOATS) return "buffers have other types";
        if (kind == SCALE ? other->height != 1 || other->width != 1 || other->channels != t->channels
                          : other->height != s->height || other->width != s->width ||
                                other->channels + s->channels != t->channels)
            return "its sizes differ";
        return 0;
    }
    if (other->type != FLOATS || t->type != FLOATS || !same_size(other, t)) return "what it adds has another size";
    if (kind != ADD && kind != CONV && kind != BINARY_CONV && kind != AFFINE && kind != DEPTHWISE)
        return "it cannot add";
    return 0;
}

static const char *check_weight(const struct packed_network *n, const struct operation *o) {
    const int32_t *f = o->fields;
    const int is_depthwise = f[KIND] == DEPTHWISE;
    if (f[KIND] != CONV && f[KIND] != BINARY_CONV && !is_depthwise) return 0;
    const int64_t depth = (int64_t)f[KERNEL_H] * f[KERNEL_W] * (is_depthwise ? 1 : o->source->channels);
    const int64_t numel = depth * o->target->channels;
    if (depth > (int64_t)1 << 24 || numel > MAX_NUMEL) return "its weight is too large";
    const int is_binary = f[KIND] == BINARY_CONV || (f[KIND] == CONV && f[FLAGS] & BINARY_WEIGHT);
    if (is_binary ? !has_shape(n, f[WEIGHT], "U8", (numel + 7) / 8) : !has_shape(n, f[WEIGHT], "F32", numel))
        return "its weight has another size";
    return 0;
}

static const char *check_channels(const struct packed_network *n, const struct operation *o) {
    const enum kind kind = (enum kind)o->fields[KIND];
    const struct buffer *t = o->target;
    const int compares = kind == THRESHOLD || (kind == BINARY_CONV && t->type == SIGNS);
    if ((kind == NORMALIZE || compares) && (o->fields[FACTOR] < 0 || o->fields[OFFSET] < 0))
        return "a tensor is missing";
    const char *dtype = compares ? "I32" : "F32";
    if (!is_per_channel(n, o, FACTOR, dtype) || (kind == SIGN && !is_absent(o, FACTOR)))
        return "its factors have another size";
    if (!is_per_channel(n, o, OFFSET, dtype)) return "its offsets have another size";
    if (compares && !are_thresholds(n, o)) return "its thresholds are damaged";
    const int has_steps = t->type == FLOATS && (kind == CONV || kind == BINARY_CONV || kind == AFFINE || kind == ADD ||
                                                kind == LAYER_NORM || kind == DEPTHWISE || kind == SCALE);
    for (int field = SHIFT; field <= AFTER; field++)
        if (has_steps ? !is_per_channel(n, o, (enum field)field, "F32") : !is_absent(o, (enum field)field))
            return "its shifts or slopes have another size";
    if (!is_per_channel(n, o, SIGN_SHIFT, "F32") || (!o->signs && !is_absent(o, SIGN_SHIFT)))
        return "its shifts of signs have another size";
    return 0;
}

/* Return what is wrong with an operation, or 0. */
static const char *check_operation(const struct packed_network *n, const struct operation *o) {
    const struct buffer *s = o->source, *t = o->target;
    const char *wrong = check_types(o);
    if (!wrong && s->slot == t->slot) wrong = "it overwrites its input";
    if (!wrong) wrong = check_sizes(o);
    if (!wrong) wrong = check_weight(n, o);
    if (!wrong) wrong = check_channels(n, o);
    if (!wrong) wrong = check_other(o);
    if (wrong) return wrong;
    if (o->signs &&
        (o->signs->type != SIGNS || t->type != FLOATS || !same_size(o->signs, t) || o->signs->slot == t->slot ||
         o->signs->slot == s->slot || (o->other && o->signs->slot == o->other->slot)))
        return "its signs have another size";
    if ((o->fields[KIND] != NORMALIZE && !holds(n, s)) || (o->other && !holds(n, o->other)))
        return "it reads what no operation has written";
    return 0;
}

static int64_t work_of(const struct operation *o) {
    const int32_t *f = o->fields;
    const struct buffer *s = o->source, *t = o->target;
    const int64_t results = t->height * t->width * t->channels, taps = (int64_t)f[KERNEL_H] * f[KERNEL_W];
    if (f[KIND] == MAX_POOL || f[KIND] == AVG_POOL || f[KIND] == DEPTHWISE) return results * taps;
    if (f[KIND] == NORMALIZE) return 4 * results; /* divisions */
    if (f[KIND] == SIGMOID) return 16 * results;
    if (f[KIND] == CONCAT) return results;
    if (f[KIND] != CONV && f[KIND] != BINARY_CONV) return s->height * s->width * s->channels;
    const int64_t rows = (t->height - 1) * f[STRIDE] + f[KERNEL_H], columns = (t->width - 1) * f[STRIDE] + f[KERNEL_W];
    return (results * taps + rows * columns) * (f[KIND] == CONV ? s->channels : s->words);
}

static const void *data_of(const struct packed_network *n, const struct operation *o, enum field field) {
    return o->fields[field] < 0 ? 0 : n->tensors[o->fields[field]].data;
}

/* The tensors per channel. */
static void take_channels(const struct packed_network *n, struct operation *o) {
    const void *factor = data_of(n, o, FACTOR), *offset = data_of(n, o, OFFSET);
    if (o->target->type == SIGNS && o->fields[KIND] != SIGN)
        o->threshold = factor, o->direction = offset;
    else
        o->factor = factor, o->offset = offset;
    o->shift = data_of(n, o, SHIFT), o->slope = data_of(n, o, SLOPE), o->after = data_of(n, o, AFTER);
    o->sign_shift = data_of(n, o, SIGN_SHIFT);
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
        if (f[SOURCE] < 0 || f[SOURCE] >= n->num_buffers || f[TARGET_BUFFER] < 0 ||
            f[TARGET_BUFFER] >= n->num_buffers || f[OTHER] < -1 || f[OTHER] >= n->num_buffers || f[SIGNS_OF] < -1 ||
            f[SIGNS_OF] >= n->num_buffers)
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
        take_channels(n, o);
    }
    const struct buffer *last = n->operations[n->num_operations - 1].target;
    if (last->type != FLOATS || last->height != 1 || last->width != 1) return "its result is not a row of logits";
    return 0;
}
