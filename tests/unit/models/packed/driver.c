/* Run programs with every path of this CPU: driver MOST_THREADS (PROGRAM PIXELS OUTPUT)...
 *
 * PIXELS: uint8 [height][width][channels]. Sums of binary convolutions must be equal with every
 * path and number of threads, and logits within 1e-5 of the largest. OUTPUT gets those of the first
 * path: int32 sums of each binary convolution, then float32 logits. Prints the paths. */
#include "packed.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const PATHS[] = {"avx512", "avx2", "neon", "portable"};
static const double TOLERANCE = 1e-5;

static void stop(const char *subject, const char *reason) {
    fprintf(stderr, "%s: %s\n", subject, reason);
    exit(1);
}

/* A block of exactly the file's size, so that reading behind it is noticed. */
static unsigned char *read_file(const char *path, size_t *size) {
    FILE *file = fopen(path, "rb");
    if (!file || fseek(file, 0, SEEK_END)) stop(path, "cannot be opened");
    *size = (size_t)ftell(file);
    rewind(file);
    unsigned char *bytes = malloc(*size);
    if (!bytes || fread(bytes, 1, *size, file) != *size) stop(path, "cannot be read");
    fclose(file);
    return bytes;
}

/* Sums of all binary convolutions, behind each other; returns the end. */
static int32_t *take_sums(struct packed_network *network, const unsigned char *pixels, int num_threads, int32_t *sums) {
    for (int i = 0; i < packed_num_operations(network); i++) {
        if (!packed_sums_size(network, i)) continue;
        if (packed_sums(network, pixels, PACKED_UINT8, i, sums, num_threads)) stop("packed_sums", "failed");
        sums += packed_sums_size(network, i);
    }
    return sums;
}

static void check(const char *path, const float *logits, const float *expected, int num) {
    double largest = 0;
    for (int i = 0; i < num; i++) largest = fmax(largest, fabs((double)expected[i]));
    for (int i = 0; i < num; i++)
        if (!(fabs((double)logits[i] - (double)expected[i]) <= TOLERANCE * largest)) stop(path, "other logits");
}

/* Float pixels give what bytes give. */
static void check_floats(const char *path, struct packed_network *network, const unsigned char *pixels,
                         const float *expected) {
    int size[3];
    packed_image_size(network, size);
    const size_t num = (size_t)size[0] * (size_t)size[1] * (size_t)size[2];
    const size_t bytes = (size_t)packed_num_classes(network) * sizeof(float);
    float *floats = malloc(num * sizeof *floats), *logits = malloc(bytes);
    if (!floats || !logits) stop("memory", "there is not enough");
    for (size_t i = 0; i < num; i++) floats[i] = pixels[i];
    if (packed_run(network, floats, PACKED_FLOAT32, logits, 1) || memcmp(logits, expected, bytes))
        stop(path, "other logits of floats");
    free(floats);
    free(logits);
}

static void run(const char *path, const char *program_file, const char *pixels_file, int most_threads, int32_t **all,
                size_t *num_all) {
    char error[256];
    size_t num_bytes, num_pixels, num_sums = 0;
    int size[3];
    unsigned char *program = read_file(program_file, &num_bytes), *pixels = read_file(pixels_file, &num_pixels);
    struct packed_network *network = packed_load(program, num_bytes, error, sizeof error);
    if (!network) stop(program_file, error);
    free(program); /* it is copied */
    packed_image_size(network, size);
    if (num_pixels != (size_t)size[0] * (size_t)size[1] * (size_t)size[2]) stop(pixels_file, "has another size");
    for (int i = 0; i < packed_num_operations(network); i++) num_sums += packed_sums_size(network, i);
    const int num_classes = packed_num_classes(network);
    for (int num_threads = 1; num_threads <= most_threads; num_threads++) {
        int32_t *found = malloc((num_sums + (size_t)num_classes) * sizeof *found);
        float *logits = malloc((size_t)num_classes * sizeof *logits);
        if (!found || !logits) stop("memory", "there is not enough");
        if (take_sums(network, pixels, num_threads, found) != found + num_sums) stop(path, "another number of sums");
        if (packed_run(network, pixels, PACKED_UINT8, logits, num_threads)) stop(path, "packed_run failed");
        memcpy(found + num_sums, logits, (size_t)num_classes * sizeof *logits);
        check_floats(path, network, pixels, logits);
        if (!*all) {
            *all = found;
            *num_all = num_sums + (size_t)num_classes;
        } else {
            if (memcmp(found, *all, num_sums * sizeof *found)) stop(path, "other sums");
            float *expected = malloc((size_t)num_classes * sizeof *expected);
            if (!expected) stop("memory", "there is not enough");
            memcpy(expected, *all + num_sums, (size_t)num_classes * sizeof *expected);
            check(path, logits, expected, num_classes);
            free(expected);
            free(found);
        }
        free(logits);
    }
    packed_free(network);
    free(pixels);
}

int main(int num_arguments, char **arguments) {
    const int most_threads = num_arguments > 1 ? atoi(arguments[1]) : 0;
    if (num_arguments < 5 || num_arguments % 3 != 2) stop("usage", "driver MOST_THREADS (PROGRAM PIXELS OUTPUT)...");
    const char *best = packed_path();
    if (!packed_use_path("none")) stop("none", "is a path");
    for (int i = 2; i < num_arguments; i += 3) {
        int32_t *all = 0;
        size_t num_all = 0;
        for (size_t path = 0; path < sizeof PATHS / sizeof *PATHS; path++) {
            if (packed_use_path(PATHS[path])) continue;
            if (strcmp(packed_path(), PATHS[path])) stop(PATHS[path], "is not used");
            if (i == 2) printf("%s\n", PATHS[path]);
            run(PATHS[path], arguments[i], arguments[i + 1], most_threads, &all, &num_all);
        }
        FILE *file = fopen(arguments[i + 2], "wb");
        if (!file || fwrite(all, sizeof *all, num_all, file) != num_all || fclose(file))
            stop(arguments[i + 2], "cannot be written");
        free(all);
    }
    if (packed_use_path(NULL) || strcmp(packed_path(), best)) stop(best, "is not the best path again");
    return 0;
}
