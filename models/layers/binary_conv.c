/* Convolutions of +-1 inputs with +-1 weights on packed bits, and the passes around them that torch would make one by one.
 *
 * Plain C with no header of torch, so that it builds in a second wherever a C compiler is. Activations are channels_last:
 * [images][rows][columns][channels]. A pixel is packed to whole 64-bit words, least significant bit first, bit 1 = +1; the bits
 * behind the last channel are 0. With x and w such words, 64 - 2 popcount(x ^ w) is the sum of 64 products: 21 additions of a
 * vector unit become one. All sums are integers, so a result has the bits of a float convolution with fp32 sums (which is exact
 * up to 2^24 products), rounded once where the output is bfloat16.
 *
 * Build with -ffp-contract=off: the pseudo-gradients have the bits of torch's eager operators.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512VPOPCNTDQ__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
enum { WORD = 64, LANES = 8, PIXELS = 8 };

/* A layer. `left` ... `bottom` is the padding, which the packed input has too: of zeros, as pixels of zero bits, or if `ones` of +1,
 * as pixels of one bits. */
struct layer {
    int64_t images, height, width, channels, outputs, out_height, out_width, kernel, stride, left, right, top, bottom, ones;
};

INLINE int64_t words_of(const struct layer *l) { return (l->channels + WORD - 1) / WORD; }
INLINE int64_t padded_height(const struct layer *l) { return l->top + l->height + l->bottom; }
INLINE int64_t padded_width(const struct layer *l) { return l->left + l->width + l->right; }

INLINE float load(const void *values, int64_t i, const int is_bf16) {
    if (!is_bf16) return ((const float *)values)[i];
    uint32_t word = (uint32_t)((const uint16_t *)values)[i] << 16;
    float value;
    memcpy(&value, &word, sizeof value);
    return value;
}

/* To the nearest bfloat16, ties to even; a NaN remains one. */
INLINE uint16_t to_bf16(float value) {
    uint32_t word;
    memcpy(&word, &value, sizeof word);
    return value != value ? 0x7fc0 : (uint16_t)((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

INLINE float rounded(float value, const int is_bf16) {
    const uint16_t half = to_bf16(value);
    return is_bf16 ? load(&half, 0, 1) : value;
}

INLINE void store(void *values, int64_t i, float value, const int is_bf16) {
    if (is_bf16)
        ((uint16_t *)values)[i] = to_bf16(value);
    else
        ((float *)values)[i] = value;
}

/* Not `>=`: torch's sign of a NaN is 0, which counts as +1. */
INLINE int is_positive(float value) { return !(value < 0.0f); }
INLINE int is_inside(float value, float limit) { return fabsf(value) <= limit; }

/* 32 bits at a time, which compilers turn into vector comparisons. */
INLINE void pack_half_word(const int width, const int is_bf16, const void *x, int64_t first, uint32_t *signs, uint32_t *inside,
                           float limit) {
    uint32_t positive = 0, within = 0;
    for (int i = 0; i < width; i++) positive |= (uint32_t)is_positive(load(x, first + i, is_bf16)) << i;
    *signs = positive;
    if (!inside) return;
    for (int i = 0; i < width; i++) within |= (uint32_t)is_inside(load(x, first + i, is_bf16), limit) << i;
    *inside = within;
}

INLINE void pack_pixel(const int is_bf16, const void *x, int64_t first, int64_t channels, uint64_t *signs, uint64_t *inside,
                       float limit) {
    for (int64_t c = 0; c < channels; c += WORD) {
        uint32_t halves[2] = {0, 0}, within[2] = {0, 0};
        for (int half = 0; half < 2; half++) {
            const int64_t begin = c + 32 * half, left = channels - begin;
            if (left >= 32)
                pack_half_word(32, is_bf16, x, first + begin, halves + half, inside ? within + half : 0, limit);
            else if (left > 0)
                pack_half_word((int)left, is_bf16, x, first + begin, halves + half, inside ? within + half : 0, limit);
        }
        *signs++ = halves[0] | (uint64_t)halves[1] << 32;
        if (inside) *inside++ = within[0] | (uint64_t)within[1] << 32;
    }
}

/* Fills `pixels` packed pixels with the padding. */
INLINE void pack_padding(const struct layer *l, int64_t pixels, uint64_t *out) {
    const int64_t words = words_of(l), rest = l->channels % WORD;
    memset(out, l->ones ? 0xff : 0, pixels * words * sizeof *out);
    if (l->ones && rest)
        for (int64_t pixel = 0; pixel < pixels; pixel++) out[pixel * words + words - 1] = ((uint64_t)1 << rest) - 1;
}

/* x: float or bfloat16 [images][height][width][channels]
 * signs: [images][padded height][padded width][words], bit 1 where x >= 0
 * inside: [images][height][width][words], bit 1 where |x| <= limit; or NULL */
void pack_input(const struct layer *l, int num_threads, const void *x, uint64_t *signs, uint64_t *inside, int is_bf16,
                float limit) {
    const int64_t words = words_of(l), row_words = padded_width(l) * words;
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (int64_t row = 0; row < l->images * padded_height(l); row++) {
        const int64_t image = row / padded_height(l), h = row % padded_height(l) - l->top;
        uint64_t *out = signs + row * row_words;
        if (h < 0 || h >= l->height) {
            pack_padding(l, padded_width(l), out);
            continue;
        }
        pack_padding(l, l->left, out);
        pack_padding(l, l->right, out + (l->left + l->width) * words);
        for (int64_t w = 0; w < l->width; w++) {
            const int64_t pixel = (image * l->height + h) * l->width + w;
            uint64_t *to = out + (l->left + w) * words, *within = inside ? inside + pixel * words : 0;
            if (is_bf16)
                pack_pixel(1, x, pixel * l->channels, l->channels, to, within, limit);
            else
                pack_pixel(0, x, pixel * l->channels, l->channels, to, within, limit);
        }
    }
}

/* others: int64 [1], 0 if every one of the layer's weights is +1 or -1. */
void find_others(const struct layer *l, int num_threads, const float *weight, int64_t *others) {
    const int64_t numel = l->outputs * l->channels * l->kernel * l->kernel;
    uint32_t found = 0;
#pragma omp parallel for num_threads(num_threads) schedule(static) reduction(| : found)
    for (int64_t i = 0; i < numel; i++) {
        uint32_t word;
        memcpy(&word, weight + i, sizeof word);
        found |= (word & 0x7fffffff) ^ 0x3f800000; /* |w| against 1.0 */
    }
    *others = found;
}

/* weight: float [outputs][channels][kernel * kernel]
 * bits: [outputs / 8, rounded up][kernel * kernel][words][8 outputs]; outputs that do not exist are 0
 * borders: [outputs / 8, rounded up][kernel * kernel][8 outputs], what a tap on a pixel of zero bits has to be corrected by: such a
 * pixel looks like one of -1 */
void pack_weight(const struct layer *l, int num_threads, const float *weight, uint64_t *bits, int64_t *borders) {
    const int64_t words = words_of(l), taps = l->kernel * l->kernel, blocks = (l->outputs + LANES - 1) / LANES;
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (int64_t output = 0; output < blocks * LANES; output++)
        for (int64_t tap = 0; tap < taps; tap++) {
            const int64_t place = (output / LANES * taps + tap) * LANES, lane = output % LANES;
            int64_t ones = 0;
            for (int64_t word = 0; word < words; word++) {
                const int64_t left = output < l->outputs ? l->channels - word * WORD : 0;
                const float *from = weight + (output * l->channels + word * WORD) * taps + tap;
                uint64_t packed = 0;
                for (int64_t i = 0; i < (left < WORD ? left : WORD); i++)
                    packed |= (uint64_t)is_positive(from[i * taps]) << i;
                bits[place * words + word * LANES + lane] = packed;
                ones += __builtin_popcountll(packed);
            }
            borders[place + lane] = 2 * ones - l->channels;
        }
}

/* Counts, for `num` pixels `step` words apart and 8 outputs, the products that are -1. `num` is a constant where this is
 * inlined: the counts stay in registers. A window is `kernel` rows, `row_words` apart, of `run` words. */
INLINE void count_block(const int num, const uint64_t *x, int64_t row_words, int64_t step, const uint64_t *weight, int64_t kernel,
                        int64_t run, int64_t (*counts)[LANES]) {
#ifdef __AVX512VPOPCNTDQ__
    __m512i sums[PIXELS];
    for (int p = 0; p < num; p++) sums[p] = _mm512_setzero_si512();
    for (int64_t i = 0; i < kernel; i++)
        for (int64_t k = 0; k < run; k++, weight += LANES) {
            const __m512i eight = _mm512_loadu_si512(weight);
#pragma GCC unroll 8
            for (int p = 0; p < num; p++) {
                const __m512i pixel = _mm512_set1_epi64((int64_t)x[i * row_words + p * step + k]);
                sums[p] = _mm512_add_epi64(sums[p], _mm512_popcnt_epi64(_mm512_xor_si512(eight, pixel)));
            }
        }
    for (int p = 0; p < num; p++) _mm512_storeu_si512(counts[p], sums[p]);
#else
    memset(counts, 0, num * sizeof *counts);
    for (int64_t i = 0; i < kernel; i++)
        for (int64_t k = 0; k < run; k++, weight += LANES)
            for (int p = 0; p < num; p++)
                for (int lane = 0; lane < LANES; lane++)
                    counts[p][lane] += __builtin_popcountll(weight[lane] ^ x[i * row_words + p * step + k]);
#endif
}

/* Sums of products of a pixel at (top, left), before the taps that lie on zeros are corrected, which only borders have. */
INLINE void correct(const struct layer *l, const int64_t *borders, int64_t top, int64_t left, int64_t *sums) {
    if (l->ones) return;
    if (top >= 0 && left >= 0 && top + l->kernel <= l->height && left + l->kernel <= l->width) return;
    for (int64_t i = 0; i < l->kernel; i++)
        for (int64_t j = 0; j < l->kernel; j++) {
            if (top + i >= 0 && top + i < l->height && left + j >= 0 && left + j < l->width) continue;
            for (int lane = 0; lane < LANES; lane++) sums[lane] += borders[(i * l->kernel + j) * LANES + lane];
        }
}

/* A row of the output for 8 output channels. */
INLINE void convolve_row(const struct layer *l, const uint64_t *x, const uint64_t *weight, const int64_t *borders, int64_t row,
                         int64_t block, void *out, const int is_bf16) {
    const int64_t words = words_of(l), row_words = padded_width(l) * words, step = l->stride * words;
    const int64_t run = l->kernel * words, all = l->kernel * l->kernel * l->channels;
    const int64_t image = row / l->out_height, top = row % l->out_height * l->stride;
    const int64_t lanes = l->outputs - block * LANES < LANES ? l->outputs - block * LANES : LANES;
    x += (image * padded_height(l) + top) * row_words;
    for (int64_t column = 0; column < l->out_width;) {
        const int64_t rest = l->out_width - column, num = rest >= 8 ? 8 : rest >= 4 ? 4 : rest >= 2 ? 2 : 1;
        const uint64_t *from = x + column * step;
        int64_t sums[PIXELS][LANES];
        if (num == 8)
            count_block(8, from, row_words, step, weight, l->kernel, run, sums);
        else if (num == 4)
            count_block(4, from, row_words, step, weight, l->kernel, run, sums);
        else if (num == 2)
            count_block(2, from, row_words, step, weight, l->kernel, run, sums);
        else
            count_block(1, from, row_words, step, weight, l->kernel, run, sums);
        for (int p = 0; p < num; p++, column++) {
            const int64_t first = (row * l->out_width + column) * l->outputs + block * LANES;
            for (int lane = 0; lane < LANES; lane++) sums[p][lane] = all - 2 * sums[p][lane];
            correct(l, borders, top - l->top, column * l->stride - l->left, sums[p]);
            if (lanes == LANES)
                for (int lane = 0; lane < LANES; lane++) store(out, first + lane, (float)sums[p][lane], is_bf16);
            else
                for (int lane = 0; lane < lanes; lane++) store(out, first + lane, (float)sums[p][lane], is_bf16);
        }
    }
}

/* x: of pack_input. weight: of pack_weight. out: float or bfloat16 [images][out height][out width][outputs] */
void convolve(const struct layer *l, int num_threads, const uint64_t *x, const uint64_t *weight,
              const int64_t *borders, void *out, int is_bf16) {
    const int64_t blocks = (l->outputs + LANES - 1) / LANES, block_words = l->kernel * l->kernel * words_of(l) * LANES;
    const int64_t rows = l->images * l->out_height;
    /* Blocks of outputs outside: the packed input of a layer is smaller than its weights, or both fit the cache. */
#pragma omp parallel for num_threads(num_threads) schedule(static) collapse(2)
    for (int64_t block = 0; block < blocks; block++)
        for (int64_t row = 0; row < rows; row++) {
            const uint64_t *eight = weight + block * block_words;
            const int64_t *eight_borders = borders + block * l->kernel * l->kernel * LANES;
            if (is_bf16)
                convolve_row(l, x, eight, eight_borders, row, block, out, 1);
            else
                convolve_row(l, x, eight, eight_borders, row, block, out, 0);
        }
}

/* The sign bit of 1.0 is the complement of the packed bit: +1 is 0x3f80(0000), -1 is 0xbf80(0000). */
INLINE void unpack_half_word(const int width, const int is_bf16, uint32_t word, void *values, int64_t first) {
    for (int i = 0; i < width; i++) {
        const uint32_t one = 0x3f800000u | ~(word >> i) << 31;
        if (is_bf16)
            ((uint16_t *)values)[first + i] = (uint16_t)(one >> 16);
        else
            ((uint32_t *)values)[first + i] = one;
    }
}

/* `stride`: words from one word of the pixel to the next. */
INLINE void unpack_pixel(const int is_bf16, const uint64_t *pixel, int64_t stride, int64_t channels, void *values, int64_t first) {
    for (int64_t c = 0; c < channels; c += 32) {
        const uint32_t word = (uint32_t)(pixel[c / WORD * stride] >> c % WORD);
        if (channels - c >= 32)
            unpack_half_word(32, is_bf16, word, values, first + c);
        else
            unpack_half_word((int)(channels - c), is_bf16, word, values, first + c);
    }
}

/* +-1 where packed, 0 on padding with zeros.
 *
 * values: float or bfloat16; with padding [images][padded height][padded width][channels], else without it */
void unpack_input(const struct layer *l, int num_threads, const uint64_t *signs, void *values, int with_padding, int is_bf16) {
    const int64_t words = words_of(l), top = with_padding ? 0 : l->top, left = with_padding ? 0 : l->left;
    const int64_t height = with_padding ? padded_height(l) : l->height, width = with_padding ? padded_width(l) : l->width;
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (int64_t row = 0; row < l->images * height; row++) {
        const int64_t image = row / height, h = row % height + top;
        for (int64_t column = 0; column < width; column++) {
            const int64_t w = column + left, first = (row * width + column) * l->channels;
            const uint64_t *pixel = signs + ((image * padded_height(l) + h) * padded_width(l) + w) * words;
            if (!l->ones && (h < l->top || h >= l->top + l->height || w < l->left || w >= l->left + l->width))
                memset((char *)values + first * (is_bf16 ? 2 : 4), 0, l->channels * (is_bf16 ? 2 : 4));
            else if (is_bf16)
                unpack_pixel(1, pixel, 1, l->channels, values, first);
            else
                unpack_pixel(0, pixel, 1, l->channels, values, first);
        }
    }
}

/* values: float or bfloat16 [outputs][kernel * kernel][channels], +-1 */
void unpack_weight(const struct layer *l, int num_threads, const uint64_t *bits, void *values, int is_bf16) {
    const int64_t words = words_of(l), taps = l->kernel * l->kernel;
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (int64_t output = 0; output < l->outputs; output++)
        for (int64_t tap = 0; tap < taps; tap++) {
            const uint64_t *row = bits + (output / LANES * taps + tap) * words * LANES + output % LANES;
            const int64_t first = (output * taps + tap) * l->channels;
            if (is_bf16)
                unpack_pixel(1, row, LANES, l->channels, values, first);
            else
                unpack_pixel(0, row, LANES, l->channels, values, first);
        }
}

/* The gradient of a weight from the layout that convolutions write to that of the weight.
 *
 * from: float or bfloat16 [outputs][taps][channels]; to: float [outputs][channels][taps] */
void transpose_taps(const struct layer *l, int num_threads, const void *from, float *to, int is_bf16) {
    const int64_t channels = l->channels, taps = l->kernel * l->kernel;
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (int64_t output = 0; output < l->outputs; output++) {
        const int64_t first = output * channels * taps;
        if (is_bf16)
            for (int64_t c = 0; c < channels; c++)
                for (int64_t t = 0; t < taps; t++) to[first + c * taps + t] = load(from, first + t * channels + c, 1);
        else
            for (int64_t c = 0; c < channels; c++)
                for (int64_t t = 0; t < taps; t++) to[first + c * taps + t] = load(from, first + t * channels + c, 0);
    }
}

/* A product with 0 or 1, as torch's: what is infinite outside becomes a NaN. */
INLINE void mask_half_word(const int width, const int is_bf16, uint32_t word, const void *grad, int64_t from, void *out, int64_t to) {
    for (int i = 0; i < width; i++)
        store(out, to + i, load(grad, from + i, is_bf16) * (float)(word >> i & 1), is_bf16);
}

INLINE void ste_row(const int is_bf16, const struct layer *l, const uint64_t *inside, const void *grad, int64_t from, void *out,
                    int64_t to) {
    for (int64_t pixel = 0; pixel < l->width; pixel++, inside += words_of(l), from += l->channels, to += l->channels)
        for (int64_t c = 0; c < l->channels; c += 32) {
            const uint32_t word = (uint32_t)(inside[c / WORD] >> c % WORD);
            if (l->channels - c >= 32)
                mask_half_word(32, is_bf16, word, grad, from + c, out, to + c);
            else
                mask_half_word((int)(l->channels - c), is_bf16, word, grad, from + c, out, to + c);
        }
}

/* The operators of quantizers.py in their order, each rounded. */
INLINE void approx_row(const int is_bf16, const struct layer *l, const void *x, const void *grad, int64_t from, void *out,
                       int64_t to) {
    for (int64_t i = 0; i < l->width * l->channels; i++) {
        const float slope = rounded(fabsf(load(x, to + i, is_bf16)) * -2.0f + 2.0f, is_bf16);
        const float clipped = slope < 0.0f ? 0.0f : slope; /* a NaN remains one */
        store(out, to + i, clipped * load(grad, from + i, is_bf16), is_bf16);
    }
}

/* Pseudo-gradients of the sign. `grad` has the padding that torch's convolution did not know of (or is as large as `out`):
 *
 * grad: float or bfloat16 [images][padded height][padded width][channels]; out: [images][height][width][channels] */
void ste_gradient(const struct layer *l, int num_threads, const uint64_t *inside, const void *grad, void *out, int is_bf16) {
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (int64_t row = 0; row < l->images * l->height; row++) {
        const int64_t padded = row / l->height * padded_height(l) + l->top + row % l->height;
        const int64_t from = (padded * padded_width(l) + l->left) * l->channels, to = row * l->width * l->channels;
        const uint64_t *mask = inside + row * l->width * words_of(l);
        if (is_bf16)
            ste_row(1, l, mask, grad, from, out, to);
        else
            ste_row(0, l, mask, grad, from, out, to);
    }
}

/* x: float or bfloat16 as `out` */
void approx_gradient(const struct layer *l, int num_threads, const void *x, const void *grad, void *out, int is_bf16) {
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (int64_t row = 0; row < l->images * l->height; row++) {
        const int64_t padded = row / l->height * padded_height(l) + l->top + row % l->height;
        const int64_t from = (padded * padded_width(l) + l->left) * l->channels, to = row * l->width * l->channels;
        if (is_bf16)
            approx_row(1, l, x, grad, from, out, to);
        else
            approx_row(0, l, x, grad, from, out, to);
    }
}
