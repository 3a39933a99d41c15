/* Flip rules on packed signs: what bop2ndorder.py and bop.py do to +-1 weights, bit for bit, with a weight in one bit.
 *
 * Plain C with no header of torch, so that it builds in a second wherever a C compiler is. The step is bound by memory: the
 * loops are written so that the compiler vectorises them whole (square roots and divisions included), and only the bytes count.
 *
 * Bits are least significant first, bit 1 = +1. With r the ratio (Bop: the moment) and t the threshold, not negative:
 *
 *     bits <- (bits & ~(r > t)) | ~(-r < t)
 *
 * A +1 becomes -1 where r > t. A -1 becomes +1 where -r > t, on the exact tie -r = t and for a NaN; both masks at once cannot
 * be. So a NaN ends as +1, as in the rule. Its payload is unspecified, every other result has the bits of the eager rule: build
 * with -ffp-contract=off and without -ffast-math.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "words of bits are read and written in little-endian order"
#endif

#define INLINE static inline __attribute__((always_inline))
#define EPS ((float)1e-10)

enum rule { BOP, BOP2NDORDER, BOP2NDORDER_CORRECTED };
enum { WORD = 32 };

struct rates {
    float gamma, sigma, threshold, divisor, divisor_sq;
};

/* Where share `i` of `count` begins. A share is a multiple of 512 weights: one cache line of bits has one writer. */
static int64_t cut(int64_t numel, int i, int count) {
    int64_t begin = (numel + 511) / 512 * i / count * 512;
    return begin < numel ? begin : numel;
}

INLINE float load(const void *values, int64_t i, const int is_bf16) {
    if (!is_bf16) return ((const float *)values)[i];
    uint32_t word = (uint32_t)((const uint16_t *)values)[i] << 16;
    float value;
    memcpy(&value, &word, sizeof value);
    return value;
}

/* Fetches what a word of weights will need 2 KiB later: square roots and divisions fill the out-of-order window, so the hardware
 * alone comes too late (15 to 20 % slower here). Past the end of an array a prefetch does nothing. */
INLINE void fetch_ahead(const void *values, int64_t first, const int num_bytes) {
    const char *here = (const char *)values + first * num_bytes;
    for (int i = 0; i < WORD * num_bytes; i += 64) __builtin_prefetch(here + 2048 + i);
}

/* Updates `width` weights, at most one word of them. `width`, `rule` and `is_bf16` are constants wherever this is inlined. */
INLINE void update_word(const int width, const enum rule rule, const int is_bf16, int64_t first, uint8_t *restrict bits,
                        const void *restrict grad, float *restrict exp_avg, float *restrict exp_avg_sq, struct rates rates) {
    uint32_t positive = 0, negative = 0, word = 0;
    for (int i = 0; i < width; i++) {
        float g = load(grad, first + i, is_bf16);
        float m = exp_avg[first + i];
        m = m + (g - m) * rates.gamma;
        exp_avg[first + i] = m;
        float ratio = m;
        if (rule != BOP) {
            float v = exp_avg_sq[first + i];
            v = v + (g * g - v) * rates.sigma;
            exp_avg_sq[first + i] = v;
            if (rule == BOP2NDORDER_CORRECTED)
                ratio = (m / rates.divisor) / (sqrtf(v / rates.divisor_sq) + EPS);
            else
                ratio = m / (sqrtf(v) + EPS);
        }
        positive |= (uint32_t)(ratio > rates.threshold) << i;
        negative |= (uint32_t)!(-ratio < rates.threshold) << i;
    }
    memcpy(&word, bits + first / 8, width / 8);
    word = (word & ~positive) | negative;
    memcpy(bits + first / 8, &word, width / 8);
}

INLINE void update_range(const enum rule rule, const int is_bf16, int64_t begin, int64_t end, uint8_t *restrict bits,
                         const void *restrict grad, float *restrict exp_avg, float *restrict exp_avg_sq, struct rates rates) {
    int64_t i = begin;
    for (; i + WORD <= end; i += WORD) {
        fetch_ahead(grad, i, is_bf16 ? 2 : 4);
        fetch_ahead(exp_avg, i, 4);
        if (rule != BOP) fetch_ahead(exp_avg_sq, i, 4);
        update_word(WORD, rule, is_bf16, i, bits, grad, exp_avg, exp_avg_sq, rates);
    }
    for (; i < end; i += 8) update_word(8, rule, is_bf16, i, bits, grad, exp_avg, exp_avg_sq, rates);
}

#define UPDATE(rule, is_bf16) update_range(rule, is_bf16, begin, end, bits, grad, exp_avg, exp_avg_sq, rates)

/* numel: a multiple of 8. grad: float or bfloat16 [numel]. exp_avg_sq: NULL for Bop. */
void update_bits(enum rule rule, int64_t numel, int num_threads, uint8_t *bits, const void *grad, int is_bf16, float *exp_avg,
                 float *exp_avg_sq, float gamma, float sigma, float threshold, float divisor, float divisor_sq) {
    const struct rates rates = {gamma, sigma, threshold, divisor, divisor_sq};
#pragma omp parallel for num_threads(num_threads) schedule(static, 1)
    for (int share = 0; share < num_threads; share++) {
        const int64_t begin = cut(numel, share, num_threads), end = cut(numel, share + 1, num_threads);
        if (rule == BOP)
            is_bf16 ? UPDATE(BOP, 1) : UPDATE(BOP, 0);
        else if (rule == BOP2NDORDER)
            is_bf16 ? UPDATE(BOP2NDORDER, 1) : UPDATE(BOP2NDORDER, 0);
        else
            is_bf16 ? UPDATE(BOP2NDORDER_CORRECTED, 1) : UPDATE(BOP2NDORDER_CORRECTED, 0);
    }
}

INLINE void pack_word(const int width, const int is_bf16, int64_t first, const void *restrict values, uint8_t *restrict bits) {
    uint32_t word = 0;
    for (int i = 0; i < width; i++) word |= (uint32_t)(load(values, first + i, is_bf16) >= 0.0f) << i;
    memcpy(bits + first / 8, &word, width / 8);
}

INLINE void pack_range(const int is_bf16, int64_t begin, int64_t end, const void *restrict values, uint8_t *restrict bits) {
    int64_t i = begin;
    for (; i + WORD <= end; i += WORD) {
        fetch_ahead(values, i, is_bf16 ? 2 : 4);
        pack_word(WORD, is_bf16, i, values, bits);
    }
    for (; i < end; i += 8) pack_word(8, is_bf16, i, values, bits);
}

/* Bit 1 where values >= 0 (so -0 is +1, NaN is -1). numel: a multiple of 8; values: float or bfloat16 [numel]. */
void pack(int64_t numel, int num_threads, const void *values, int is_bf16, uint8_t *bits) {
#pragma omp parallel for num_threads(num_threads) schedule(static, 1)
    for (int share = 0; share < num_threads; share++) {
        const int64_t begin = cut(numel, share, num_threads), end = cut(numel, share + 1, num_threads);
        is_bf16 ? pack_range(1, begin, end, values, bits) : pack_range(0, begin, end, values, bits);
    }
}

/* The sign bit of 1.0 is the complement of the weight's bit: +1 is 0x3f80(0000), -1 is 0xbf80(0000). */
INLINE void unpack_word(const int width, const int is_bf16, int64_t first, const uint8_t *restrict bits, void *restrict values) {
    uint32_t word = 0;
    memcpy(&word, bits + first / 8, width / 8);
    for (int i = 0; i < width; i++) {
        const uint32_t sign = ~(word >> i) << 31, one = 0x3f800000u | sign;
        if (is_bf16)
            ((uint16_t *)values)[first + i] = (uint16_t)(one >> 16);
        else
            ((uint32_t *)values)[first + i] = one;
    }
}

INLINE void unpack_range(const int is_bf16, int64_t begin, int64_t end, const uint8_t *restrict bits, void *restrict values) {
    int64_t i = begin;
    for (; i + WORD <= end; i += WORD) {
        fetch_ahead(values, i, is_bf16 ? 2 : 4);
        unpack_word(WORD, is_bf16, i, bits, values);
    }
    for (; i < end; i += 8) unpack_word(8, is_bf16, i, bits, values);
}

/* Writes +-1. numel: a multiple of 8; values: float or bfloat16 [numel]. */
void unpack(int64_t numel, int num_threads, const uint8_t *bits, int is_bf16, void *values) {
#pragma omp parallel for num_threads(num_threads) schedule(static, 1)
    for (int share = 0; share < num_threads; share++) {
        const int64_t begin = cut(numel, share, num_threads), end = cut(numel, share + 1, num_threads);
        is_bf16 ? unpack_range(1, begin, end, bits, values) : unpack_range(0, begin, end, bits, values);
    }
}

INLINE void unpack_changed_range(const int is_bf16, int64_t begin, int64_t end, const uint8_t *restrict changed,
                                 const uint8_t *restrict bits, void *restrict values) {
    for (int64_t i = begin; i < end;) {
        uint64_t word = 0;
        if (i + 64 <= end) memcpy(&word, changed + i / 8, 8);
        if (i + 64 <= end && word == 0) {
            i += 64;
            continue;
        }
        for (int64_t last = i + 64 < end ? i + 64 : end; i < last; i += 8)
            if (changed[i / 8]) unpack_word(8, is_bf16, i, bits, values);
    }
}

/* Writes +-1, but no byte's weights of which `changed` has no bit: few flip in a step, and writing all costs a tenth of one. */
void unpack_changed(int64_t numel, int num_threads, const uint8_t *changed, const uint8_t *bits, int is_bf16, void *values) {
#pragma omp parallel for num_threads(num_threads) schedule(static, 1)
    for (int share = 0; share < num_threads; share++) {
        const int64_t begin = cut(numel, share, num_threads), end = cut(numel, share + 1, num_threads);
        is_bf16 ? unpack_changed_range(1, begin, end, changed, bits, values)
                : unpack_changed_range(0, begin, end, changed, bits, values);
    }
}
