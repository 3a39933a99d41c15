/* Run a network that `bitfleet export` wrote, on one image at a time, without Python.
 *
 *     char error[256];
 *     struct packed_network *network = packed_load(bytes, num_bytes, error, sizeof error);
 *     if (!network) ...                                   // error says why
 *     float *logits = malloc(packed_num_classes(network) * sizeof *logits);
 *     packed_run(network, pixels, PACKED_UINT8, logits, 1);
 *     packed_free(network);
 *
 * `make libbitfleet_packed` builds it; link libm, and OpenMP where threads are wanted. Every
 * function may be called from several threads at once, except two of packed_run, packed_sums and
 * packed_free with the same network. */
#ifndef BITFLEET_PACKED_H
#define BITFLEET_PACKED_H
#include <stddef.h>
#include <stdint.h>

struct packed_network;

enum packed_pixels { PACKED_UINT8, PACKED_FLOAT32 }; /* both on the scale 0..255 */

/* Read a program file; it is copied. Returns NULL for a file that is foreign, cut off or
 * inconsistent, or that needs more than 1 GiB of memory or 2^36 steps of work, with a sentence in
 * `error`. The hash of the file is not checked here. */
struct packed_network *packed_load(const void *file, size_t num_bytes, char *error, size_t error_size);
void packed_free(struct packed_network *network);

/* Size of an image, [height][width][channels], and of the result. */
void packed_image_size(const struct packed_network *network, int size[3]);
int packed_num_classes(const struct packed_network *network);

/* Name of a class, in UTF-8, cut to `size` bytes. Returns 0, or -1 if the file does not name it. */
int packed_class_name(const struct packed_network *network, int index, char *name, size_t size);

/* Compute the logits of one image on `num_threads` threads; small operations run on one of them.
 * Returns 0, or -1 if there is not enough memory. */
int packed_run(struct packed_network *network, const void *pixels, enum packed_pixels kind, float *logits,
               int num_threads);

/* Instruction sets: every one gives the same integers in binary layers. Networks that are loaded
 * from now on use the one with this name: "avx512", "avx2", "neon", "portable"; NULL: the best of
 * this CPU, as at the start. Returns 0, or -1 if the CPU or this build does not have it. */
int packed_use_path(const char *name);
const char *packed_path(void);

/* For tests and measurements. Sums of products of binary convolution `index`, int32 [out
 * height][out width][outputs], in a run of an image. `packed_sums_size` gives their number, or 0 if
 * the operation is not a binary convolution. */
int packed_num_operations(const struct packed_network *network);
size_t packed_sums_size(const struct packed_network *network, int index);
int packed_sums(struct packed_network *network, const void *pixels, enum packed_pixels kind, int index, int32_t *sums,
                int num_threads);
/* Seconds that the last packed_run spent in each operation. */
const double *packed_seconds(const struct packed_network *network);
#endif
