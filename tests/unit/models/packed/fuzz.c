/* Load and run damaged programs: fuzz SEED COUNT PROGRAM...
 *
 * Each of COUNT mutations of the programs is loaded and, if it is accepted, run on one image. Built
 * with sanitizers, which end the process at the first fault. Then each allocation fails once.
 * Prints how many programs were refused, accepted, and accepted but too much work to run here. */
#define _POSIX_C_SOURCE 200809L
#include <stddef.h>
#include <stdlib.h>

/* All allocations of packed.c are counted, and one may fail. */
static size_t requested;
static long allocations_left = -1;
static int may_allocate(size_t bytes) {
    requested += bytes;
    return allocations_left < 0 || allocations_left-- > 0;
}
static void *counted_malloc(size_t bytes) { return may_allocate(bytes) ? malloc(bytes) : 0; }
static void *counted_calloc(size_t number, size_t bytes) {
    return may_allocate(number * bytes) ? calloc(number, bytes) : 0;
}
static void *counted_realloc(void *block, size_t bytes) { return may_allocate(bytes) ? realloc(block, bytes) : 0; }
static void *counted_aligned_alloc(size_t alignment, size_t bytes) {
    return may_allocate(bytes) ? aligned_alloc(alignment, bytes) : 0;
}
#define malloc counted_malloc
#define calloc counted_calloc
#define realloc counted_realloc
#define aligned_alloc counted_aligned_alloc
#include "packed.c"
#undef malloc
#undef calloc
#undef realloc
#undef aligned_alloc

enum { MAX_PROGRAMS = 64, MOST_MUTATIONS = 3, TABLES = 1 << 21 };
static const int64_t MOST_WORK = 1 << 21;

struct program {
    unsigned char *bytes;
    size_t size, header;        /* of the JSON, which follows 8 bytes */
    size_t tables[2], sizes[2]; /* "program" and "buffers": first byte, number of int32 */
};

static uint64_t state;
static uint64_t random_number(uint64_t below) { /* splitmix64 */
    uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (z ^ (z >> 31)) % below;
}

static void stop(const char *subject, const char *reason) {
    fprintf(stderr, "%s: %s\n", subject, reason);
    exit(1);
}

static struct program read_program(const char *path) {
    struct program p = {0};
    FILE *file = fopen(path, "rb");
    if (!file || fseek(file, 0, SEEK_END)) stop(path, "cannot be opened");
    p.size = (size_t)ftell(file);
    rewind(file);
    p.bytes = malloc(p.size);
    if (!p.bytes || fread(p.bytes, 1, p.size, file) != p.size) stop(path, "cannot be read");
    fclose(file);
    struct tensor tables[2] = {{"", 0, {0}, 0, 0}, {"", 0, {0}, 0, 0}};
    struct packed_network *n = calloc(1, sizeof *n);
    n->file = p.bytes;
    n->num_tensors = MAX_TENSORS;
    n->tensors = calloc(MAX_TENSORS, sizeof *n->tensors);
    const char *wrong = read_header(n, (int64_t)p.size, tables, tables + 1);
    if (wrong) stop(path, wrong);
    for (int i = 0; i < 2; i++) p.tables[i] = (size_t)(tables[i].data - p.bytes), p.sizes[i] = (size_t)tables[i].numel;
    for (int i = 0; i < 4; i++) p.header |= (size_t)p.bytes[i] << (8 * i);
    n->file = 0;
    packed_free(n);
    return p;
}

static int32_t extreme(void) {
    static const int32_t values[] = {INT32_MIN, -65536, -2,      -1,      0,       1,       2,        3,
                                     4,         5,      7,       8,       11,      12,      13,       14,
                                     15,        16,     31,      63,      64,      65,      200,      1000,
                                     3000,      4095,   4096,    9000,    32767,   32768,   65535,    65536,
                                     1 << 20,   1 << 24, 1 << 28, 1 << 30, INT32_MAX};
    return values[random_number(sizeof values / sizeof *values)];
}

/* A field of a table becomes an extreme, its neighbour, or the same field of another row; in all
 * rows that have the same value, or in one. */
static void change_table(const struct program *p, unsigned char *bytes) {
    const size_t table = random_number(2), columns = table ? BUFFER_FIELDS : FIELDS,
                 at = random_number(p->sizes[table]);
    const int is_one = random_number(2) == 0;
    int32_t value, before;
    memcpy(&value, bytes + p->tables[table] + 4 * at, 4);
    switch (random_number(5)) {
    case 0:
    case 1:
        value = extreme();
        break;
    case 2:
        value = (int32_t)((uint32_t)value + (random_number(2) ? 1u : UINT32_MAX));
        break;
    case 3:
        value = (int32_t)((uint32_t)value * 2u);
        break;
    default:
        memcpy(&value,
               bytes + p->tables[table] + 4 * (random_number(p->sizes[table] / columns) * columns + at % columns), 4);
    }
    memcpy(&before, bytes + p->tables[table] + 4 * at, 4);
    for (size_t i = 0; i < p->sizes[table]; i++) {
        unsigned char *field = bytes + p->tables[table] + 4 * i;
        if (is_one ? i == at : i % columns == at % columns && !memcmp(field, &before, 4)) memcpy(field, &value, 4);
    }
}

/* A byte of the JSON becomes another, or digits do. */
static void change_header(const struct program *p, unsigned char *bytes) {
    static const char symbols[] = "{}[]\":,\\u0123456789 \n-.eFIU8_\0\xff\x80";
    size_t at = 8 + random_number(p->header);
    switch (random_number(3)) {
    case 0:
        bytes[at] = (unsigned char)symbols[random_number(sizeof symbols)];
        break;
    case 1: /* the next number */
        while (at < 8 + p->header && (bytes[at] < '0' || bytes[at] > '9')) at++;
        for (; at < 8 + p->header && bytes[at] >= '0' && bytes[at] <= '9'; at++)
            bytes[at] = (unsigned char)('0' + random_number(10));
        break;
    default: { /* a piece of it is repeated elsewhere, such as the name of a tensor */
        const size_t length = 1 + random_number(24), from = 8 + random_number(p->header);
        if (at + length <= 8 + p->header && from + length <= 8 + p->header) memmove(bytes + at, bytes + from, length);
    }
    }
}

/* Change `bytes`, which have the size of the program, and return their new size. */
static size_t mutate(const struct program *p, unsigned char *bytes) {
    size_t size = p->size;
    for (uint64_t left = 1 + random_number(MOST_MUTATIONS); left > 0; left--) {
        const uint64_t way = random_number(16);
        if (way < 9)
            change_table(p, bytes);
        else if (way < 11)
            change_header(p, bytes);
        else if (way == 11)
            bytes[random_number(p->size)] ^= (unsigned char)(1 << random_number(8));
        else if (way == 12)
            bytes[random_number(8)] = (unsigned char)random_number(256); /* length of the header */
        else if (way == 13)
            size = random_number(size + 1);
        else /* values of weights and tables */
            for (size_t i = 0, at = 8 + p->header + random_number(p->size - 8 - p->header); i < 8 && at + i < p->size;
                 i++)
                bytes[at + i] = random_number(2) ? 0xff : (unsigned char)random_number(256);
    }
    return size;
}

static void check_memory(void) {
    if (requested > (size_t)MAX_MEMORY + TABLES) stop("memory", "more than the limit was asked for");
}

/* Run an accepted program; 0 if that is too much work. */
static int run_accepted(struct packed_network *n) {
    char name[8];
    int size[3];
    packed_class_name(n, (int)random_number(8), name, random_number(sizeof name + 1));
    if (n->work > MOST_WORK || n->memory > 64 * MOST_WORK) return 0;
    packed_image_size(n, size);
    const int is_float = random_number(2) == 0, num_threads = 1 + (int)random_number(3);
    const size_t num = (size_t)size[0] * (size_t)size[1] * (size_t)size[2];
    unsigned char *pixels = malloc(num * (is_float ? 4 : 1));
    float *logits = malloc((size_t)packed_num_classes(n) * sizeof *logits);
    if (!pixels || !logits) stop("memory", "there is not enough");
    for (size_t i = 0; i < num; i++) {
        if (is_float)
            ((float *)(void *)pixels)[i] = (float)random_number(256);
        else
            pixels[i] = (unsigned char)random_number(256);
    }
    const enum packed_pixels kind = is_float ? PACKED_FLOAT32 : PACKED_UINT8;
    if (packed_run(n, pixels, kind, logits, num_threads)) stop("packed_run", "failed");
    check_memory();
    const int index = (int)random_number((uint64_t)packed_num_operations(n));
    const size_t num_sums = packed_sums_size(n, index);
    int32_t *sums = malloc(num_sums * sizeof *sums + 1);
    if (!sums || packed_sums(n, pixels, kind, index, sums, num_threads) != (num_sums ? 0 : -1))
        stop("packed_sums", "failed");
    free(sums);
    free(pixels);
    free(logits);
    return 1;
}

/* Fail each allocation once: NULL or -1, and no leak. */
static void fail_allocations(const struct program *p) {
    char error[64];
    int size[3];
    for (long allowed = 0;; allowed++) {
        allocations_left = allowed;
        struct packed_network *n = packed_load(p->bytes, p->size, error, sizeof error);
        if (!n) continue;
        packed_image_size(n, size);
        unsigned char *pixels = calloc((size_t)size[0] * (size_t)size[1], (size_t)size[2]);
        float *logits = malloc((size_t)packed_num_classes(n) * sizeof *logits);
        const int failed = packed_run(n, pixels, PACKED_UINT8, logits, 2);
        free(pixels);
        free(logits);
        packed_free(n);
        if (!failed) break;
    }
    allocations_left = -1;
}

int main(int num_arguments, char **arguments) {
    static const char *const paths[] = {"avx512", "avx2", "neon", "portable"};
    long refused = 0, accepted = 0, large = 0;
    struct program programs[MAX_PROGRAMS];
    if (num_arguments < 4 || num_arguments > MAX_PROGRAMS) stop("usage", "fuzz SEED COUNT PROGRAM...");
    const int num_programs = num_arguments - 3;
    for (int i = 0; i < num_programs; i++) programs[i] = read_program(arguments[3 + i]);
    for (int i = 0; i < num_programs; i++) fail_allocations(programs + i);
    state = strtoull(arguments[1], 0, 10);
    for (long count = atol(arguments[2]); count > 0; count--) {
        char error[64] = "";
        const struct program *p = programs + random_number((uint64_t)num_programs);
        unsigned char *bytes = malloc(p->size);
        if (!bytes) stop("memory", "there is not enough");
        memcpy(bytes, p->bytes, p->size);
        const size_t size = mutate(p, bytes);
        unsigned char *exact = realloc(bytes, size ? size : 1); /* reading behind it is noticed */
        packed_use_path(paths[random_number(sizeof paths / sizeof *paths)]);
        requested = 0;
        struct packed_network *n = packed_load(exact, size, error, random_number(sizeof error + 1));
        free(exact);
        check_memory();
        if (!n) {
            refused++;
        } else if (run_accepted(n)) {
            accepted++;
        } else {
            large++;
        }
        packed_free(n);
    }
    for (int i = 0; i < num_programs; i++) free(programs[i].bytes);
    printf("%ld %ld %ld\n", refused, accepted, large);
    return 0;
}
