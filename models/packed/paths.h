/* Instruction sets, for packed.c: their inner loops, and which of them a network uses. */
#if defined __x86_64__
#include <immintrin.h>
#elif defined __aarch64__
#include <arm_neon.h>
#endif

#define NAME(x) x##_portable
#define TARGET
#define COUNT_PIXELS 4
#define DIFFER_WIDE LANES
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
#define COUNT_PIXELS 7 /* more would not fit the cache of decoded instructions */
#define DIFFER_WIDE 32
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
        mask |= (uint64_t)_mm512_cmp_ps_mask(_mm512_loadu_ps(values + 16 * i), _mm512_setzero_ps(), _CMP_LT_OQ)
                << (16 * i);
    return mask;
}
TARGET INLINE __mmask16 negative_avx512(__m512 values) {
    return _mm512_cmp_ps_mask(values, _mm512_setzero_ps(), _CMP_LT_OQ);
}
/* -2^24, whose last bit is worth 2: an n added to its bits as an integer makes it -2^24 - 2n. */
#define MINUS_2_24 ((int32_t)0xCB800000)
/* 16 outputs from `at` of pixel `p`; `counted` is MINUS_2_24 + the number of differing bits. */
TARGET INLINE void finish_avx512(const struct epilogue *e, const int is_plain, int64_t p, int64_t at, __m512i counted,
                                 __m512 factor, __m512 offset) {
    const int64_t to = p * e->channels + at, place = e->column_place[p];
    if (place != e->whole)
        counted = _mm512_add_epi32(counted, _mm512_loadu_si512(e->correction + place * e->channels + at));
    __m512 values = _mm512_add_ps(_mm512_castsi512_ps(counted), _mm512_set1_ps(e->shifted_products[place]));
    if (!is_plain && e->has_relu_first) values = _mm512_maskz_mov_ps((__mmask16)~negative_avx512(values), values);
    values = _mm512_mul_ps(values, factor);
    values = _mm512_add_ps(values, offset);
    if (e->added) values = _mm512_add_ps(values, _mm512_loadu_ps(e->added + to));
    if (!is_plain && e->shift) values = _mm512_add_ps(values, _mm512_loadu_ps(e->shift + at));
    __mmask16 negative = negative_avx512(values);
    if (!is_plain && e->has_relu) {
        values = _mm512_maskz_mov_ps((__mmask16)~negative, values);
        negative = 0;
    }
    if (!is_plain) {
        if (e->slope) values = _mm512_mask_mul_ps(values, negative, values, _mm512_loadu_ps(e->slope + at));
        if (e->after) values = _mm512_add_ps(values, _mm512_loadu_ps(e->after + at));
        const __m512 shifted = e->sign_shift ? _mm512_add_ps(values, _mm512_loadu_ps(e->sign_shift + at)) : values;
        negative = negative_avx512(shifted);
    }
    _mm512_storeu_ps(e->out + to, values);
    const uint16_t signs = (uint16_t)~negative;
    if (e->bits) memcpy((unsigned char *)(e->bits + p * e->words) + at / 8, &signs, sizeof signs);
}
/* GCC would load the word to a register first, which takes as long as a third of the work on it. */
TARGET INLINE __m512i xor_avx512(__m512i values, const void *word) {
    __m512i result;
    __asm__("vpxord %2%{1to16%}, %1, %0" : "=v"(result) : "v"(values), "m"(*(const int32_t *)word));
    return result;
}
/* To `out`, or through `e` to outputs from `at` of the pixels from `first_pixel`. */
TARGET INLINE void count_or_finish(const int num, const uint64_t *x, int64_t row_stride, int64_t step,
                                   const uint64_t *weight, int64_t kernel_rows, int64_t run, int32_t *out,
                                   int64_t out_step, const struct epilogue *e, const int is_plain, int64_t first_pixel,
                                   int64_t at, const __m512 *factor, const __m512 *offset) {
    typedef uint32_t __attribute__((may_alias)) half;
    const half *w = (const half *)weight;
    __m512i sums[COUNT_PIXELS][2];
#pragma GCC unroll 7
    for (int p = 0; p < num; p++) sums[p][0] = sums[p][1] = _mm512_set1_epi32(e ? MINUS_2_24 : 0);
    for (int64_t i = 0; i < kernel_rows; i++) {
        const half *row = (const half *)(x + i * row_stride);
        for (int64_t k = 0; k < 2 * run; k++, w += DIFFER_WIDE) {
            const __m512i first = _mm512_loadu_si512(w), second = _mm512_loadu_si512(w + 16);
#pragma GCC unroll 7
            for (int p = 0; p < num; p++) {
                const half *pixel = row + 2 * p * step + k;
                sums[p][0] = _mm512_add_epi32(sums[p][0], _mm512_popcnt_epi32(xor_avx512(first, pixel)));
                sums[p][1] = _mm512_add_epi32(sums[p][1], _mm512_popcnt_epi32(xor_avx512(second, pixel)));
            }
        }
    }
#pragma GCC unroll 7
    for (int p = 0; p < num; p++)
#pragma GCC unroll 2
        for (int v = 0; v < 2; v++)
            if (e)
                finish_avx512(e, is_plain, first_pixel + p, at + 16 * v, sums[p][v], factor[v], offset[v]);
            else
                _mm512_storeu_si512(out + p * out_step + 16 * v, sums[p][v]);
}
TARGET INLINE void count_avx512(const int num, const uint64_t *x, int64_t row_stride, int64_t step,
                                const uint64_t *weight, int64_t kernel_rows, int64_t run, int32_t *out,
                                int64_t out_step) {
    count_or_finish(num, x, row_stride, step, weight, kernel_rows, run, out, out_step, 0, 0, 0, 0, 0, 0);
}
#define FINISH_PIXELS(num) \
    for (; p + (num) <= pixels; p += (num))                                                                         \
    count_or_finish(num, x + p * step, row_stride, step, weight, kernel_rows, run, 0, 0, e, is_plain, p, n, factor, \
                    offset)
/* `pixels` of a row, all outputs. */
TARGET INLINE void finish_row(int64_t pixels, const uint64_t *x, int64_t row_stride, int64_t step,
                              const uint64_t *weight, int64_t kernel_rows, int64_t run, int64_t outputs,
                              const struct epilogue *e, const int is_plain) {
    for (int64_t n = 0; n < outputs; n += DIFFER_WIDE, weight += kernel_rows * run * DIFFER_WIDE) {
        __m512 factor[2], offset[2];
#pragma GCC unroll 2
        for (int v = 0; v < 2; v++) {
            factor[v] = e->factor ? _mm512_loadu_ps(e->factor + n + 16 * v) : _mm512_set1_ps(1.0f);
            offset[v] = e->offset ? _mm512_loadu_ps(e->offset + n + 16 * v) : _mm512_setzero_ps();
        }
        int64_t p = 0;
        FINISH_PIXELS(COUNT_PIXELS);
        FINISH_PIXELS(4);
        FINISH_PIXELS(2);
        FINISH_PIXELS(1);
    }
}
/* With a copy of `shared`, which no pointer reaches: what it holds stays in registers. Not inlined, or those of the
 * other loops would be saved around it. */
TARGET static __attribute__((noinline)) void fused_avx512(int64_t pixels, const uint64_t *x, int64_t row_stride,
                                                          int64_t step, const uint64_t *weight, int64_t kernel_rows,
                                                          int64_t run, int64_t outputs, const struct epilogue *shared) {
    const struct epilogue e = *shared;
    if (e.is_plain)
        finish_row(pixels, x, row_stride, step, weight, kernel_rows, run, outputs, &e, 1);
    else
        finish_row(pixels, x, row_stride, step, weight, kernel_rows, run, outputs, &e, 0);
}
#define HAS_FUSED
#include "kernels.h"

#define NAME(x) x##_avx2
#define TARGET __attribute__((target("avx2,fma")))
#define COUNT_PIXELS 4
#define DIFFER_WIDE LANES
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
TARGET INLINE void count_avx2(const int num, const uint64_t *x, int64_t row_stride, int64_t step,
                              const uint64_t *weight, int64_t kernel_rows, int64_t run, int32_t *out,
                              int64_t out_step) {
    const __m256i table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2,
                                           2, 3, 2, 3, 3, 4);
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
                    const __m256i high =
                        _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(bits, 4), nibble));
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
#define DIFFER_WIDE LANES
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
                    bytes[p][v] = vaddq_u8(
                        bytes[p][v], vcntq_u8(vreinterpretq_u8_u64(veorq_u64(w, vdupq_n_u64(row[p * step + k])))));
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
    {"avx512", 64, 32, 2, convolve_row_avx512, map_row_avx512},
    {"avx2", 16, 8, 1, convolve_row_avx2, map_row_avx2},
#elif defined __aarch64__
    {"neon", 16, 8, 1, convolve_row_neon, map_row_neon},
#endif
    {"portable", 8, 8, 1, convolve_row_portable, map_row_portable},
};
enum { NUM_PATHS = sizeof PATHS / sizeof *PATHS };
static const struct path *_Atomic chosen;

static int is_supported(const struct path *path) {
#if defined __x86_64__
    if (!strcmp(path->name, "avx512"))
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("fma");
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
