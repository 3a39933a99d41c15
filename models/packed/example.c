/* Classify an image with an exported network: packed_example PROGRAM IMAGE.ppm
 *
 * The image is a binary PPM (P6) of the program's size; make one of any picture with
 *     convert PICTURE -resize 224x224^ -gravity center -extent 224x224 IMAGE.ppm */
#include "packed.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { NUM_SHOWN = 5, MAX_NAME = 128 };

static void stop(const char *subject, const char *reason) {
    fprintf(stderr, "packed_example: %s: %s\n", subject, reason);
    exit(1);
}

/* All bytes of a file; a 0 follows them. */
static unsigned char *read_file(const char *path, size_t *size) {
    FILE *file = fopen(path, "rb");
    if (!file) stop(path, "cannot be opened");
    unsigned char *bytes = 0;
    size_t room = 0;
    *size = 0;
    do {
        if (*size == room) bytes = realloc(bytes, (room = 2 * room + (1 << 16)) + 1);
        if (!bytes) stop(path, "there is not enough memory");
        *size += fread(bytes + *size, 1, room - *size, file);
    } while (!feof(file) && !ferror(file));
    if (ferror(file)) stop(path, "cannot be read");
    fclose(file);
    bytes[*size] = 0;
    return bytes;
}

/* A number of the header of a PPM, after white space and comments; -1 if there is none. */
static int take_number(const unsigned char **at) {
    int number = 0;
    while (**at == ' ' || **at == '\n' || **at == '\r' || **at == '\t' || **at == '#')
        if (*(*at)++ == '#')
            while (**at && **at != '\n') (*at)++;
    if (**at < '0' || **at > '9') return -1;
    for (; **at >= '0' && **at <= '9' && number < 1 << 20; (*at)++) number = 10 * number + **at - '0';
    return number;
}

/* The pixels in the bytes of a PPM, [height][width][3]. */
static const unsigned char *pixels_of(const char *path, const unsigned char *bytes, size_t num_bytes,
                                      const int size[3]) {
    char reason[128];
    const unsigned char *at = bytes + 2;
    if (num_bytes < 2 || memcmp(bytes, "P6", 2)) stop(path, "is not a binary PPM (P6)");
    const int width = take_number(&at), height = take_number(&at), most = take_number(&at);
    if (width < 1 || height < 1 || most != 255) stop(path, "has a damaged header, or no bytes as pixels");
    if (height != size[0] || width != size[1] || size[2] != 3) {
        snprintf(reason, sizeof reason, "has %d x %d pixels, height first; the program takes %d x %d", height, width,
                 size[0], size[1]);
        stop(path, reason);
    }
    const size_t header = (size_t)(at - bytes) + 1; /* a single white space follows */
    if (num_bytes < header || num_bytes - header < (size_t)height * (size_t)width * 3) stop(path, "is cut off");
    return bytes + header;
}

static void print_best(const struct packed_network *network, const float *logits, int num_classes) {
    int best[NUM_SHOWN], num_best = 0;
    for (int i = 0; i < num_classes; i++) { /* insert in order */
        int at = num_best < NUM_SHOWN ? num_best++ : NUM_SHOWN;
        for (; at > 0 && logits[i] > logits[best[at - 1]]; at--)
            if (at < NUM_SHOWN) best[at] = best[at - 1];
        if (at < NUM_SHOWN) best[at] = i;
    }
    double sum = 0;
    for (int i = 0; i < num_classes; i++) sum += exp((double)logits[i] - (double)logits[best[0]]);
    for (int i = 0; i < num_best; i++) {
        char name[MAX_NAME];
        if (packed_class_name(network, best[i], name, sizeof name)) snprintf(name, sizeof name, "class %d", best[i]);
        printf("%5.1f %%  %s\n", 100 * exp((double)logits[best[i]] - (double)logits[best[0]]) / sum, name);
    }
}

int main(int num_arguments, char **arguments) {
    char error[256];
    size_t num_bytes, num_image_bytes;
    int size[3];
    if (num_arguments != 3) stop("usage", "packed_example PROGRAM IMAGE.ppm");
    unsigned char *program = read_file(arguments[1], &num_bytes);
    struct packed_network *network = packed_load(program, num_bytes, error, sizeof error);
    if (!network) stop(arguments[1], error);
    packed_image_size(network, size);
    unsigned char *image = read_file(arguments[2], &num_image_bytes);
    const unsigned char *pixels = pixels_of(arguments[2], image, num_image_bytes, size);
    const int num_classes = packed_num_classes(network);
    float *logits = malloc((size_t)num_classes * sizeof *logits);
    if (!logits || packed_run(network, pixels, PACKED_UINT8, logits, 1))
        stop(arguments[1], "there is not enough memory");
    print_best(network, logits, num_classes);
    double seconds = 0;
    for (int i = 0; i < packed_num_operations(network); i++) seconds += packed_seconds(network)[i];
    printf("%.2f ms (%s)\n", 1e3 * seconds, packed_path());
    free(logits);
    free(image);
    packed_free(network);
    free(program);
    return 0;
}
