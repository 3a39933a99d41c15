/* The inner loops, included once per instruction set by paths.h with
 *   NAME(x)          the name of a function of this set
 *   TARGET           attribute that lets the compiler use it
 *   COUNT_PIXELS, DIFFER_WIDE    block of `count`: pixels and outputs
 *   DOT_PIXELS, DOT_VECTORS      block of `dot`: pixels, and vectors of outputs
 *   vf, VF           vector of VF floats: LOADF, STOREF, SPLATF, FMAF
 *   and a body of NAME(count) and NAME(mask); with HAS_FUSED also of NAME(fused).
 * A window is `kernel_rows` rows, `row_stride` apart, of `run` words or values; pixels are `step`
 * apart. */

/* Sums over windows: out[p][n] = sum x * w. weight: [kernel_rows * run][DOT_VECTORS * VF]. */
TARGET INLINE void NAME(dot_block)(const int num, const float *x, int64_t row_stride, int64_t step, const float *weight,
                                   int64_t kernel_rows, int64_t run, float *out, int64_t out_step) {
    vf sums[DOT_PIXELS][DOT_VECTORS];
    for (int p = 0; p < num; p++)
        for (int v = 0; v < DOT_VECTORS; v++) sums[p][v] = SPLATF(0.0f);
    for (int64_t i = 0; i < kernel_rows; i++) {
        const float *row = x + i * row_stride;
        for (int64_t k = 0; k < run; k++, weight += DOT_VECTORS * VF) {
            vf w[DOT_VECTORS];
            for (int v = 0; v < DOT_VECTORS; v++) w[v] = LOADF(weight + v * VF);
#pragma GCC unroll 8
            for (int p = 0; p < num; p++) {
                const vf value = SPLATF(row[p * step + k]);
#pragma GCC unroll 4
                for (int v = 0; v < DOT_VECTORS; v++) sums[p][v] = FMAF(w[v], value, sums[p][v]);
            }
        }
    }
    for (int p = 0; p < num; p++)
        for (int v = 0; v < DOT_VECTORS; v++) STOREF(out + p * out_step + v * VF, sums[p][v]);
}

/* `num` pixels of a row, all outputs. out: [num][outputs rounded up to blocks]. */
TARGET static void NAME(dot)(int64_t num, const float *x, int64_t row_stride, int64_t step, const float *weight,
                             int64_t kernel_rows, int64_t run, int64_t outputs, float *out) {
    const int64_t wide = DOT_VECTORS * VF, padded = (outputs + wide - 1) / wide * wide;
    for (int64_t n = 0; n < padded; n += wide, weight += kernel_rows * run * wide) {
        int64_t p = 0;
        for (; p + DOT_PIXELS <= num; p += DOT_PIXELS)
            NAME(dot_block)(DOT_PIXELS, x + p * step, row_stride, step, weight, kernel_rows, run, out + p * padded + n,
                            padded);
        for (; p + 2 <= num; p += 2)
            NAME(dot_block)(2, x + p * step, row_stride, step, weight, kernel_rows, run, out + p * padded + n, padded);
        for (; p < num; p++)
            NAME(dot_block)(1, x + p * step, row_stride, step, weight, kernel_rows, run, out + p * padded + n, padded);
    }
}

/* Number of differing bits, `num` pixels of a row, all outputs.
 * weight: [outputs / DIFFER_WIDE][kernel_rows * run][parts of a word][DIFFER_WIDE];
 * out: [num][outputs rounded up to blocks]. */
TARGET static void NAME(differ)(int64_t num, const uint64_t *x, int64_t row_stride, int64_t step,
                                const uint64_t *weight, int64_t kernel_rows, int64_t run, int64_t outputs,
                                int32_t *out) {
    const int64_t wide = DIFFER_WIDE, padded = (outputs + wide - 1) / wide * wide;
    for (int64_t n = 0; n < padded; n += wide, weight += kernel_rows * run * wide) {
        int64_t p = 0;
        for (; p + COUNT_PIXELS <= num; p += COUNT_PIXELS)
            NAME(count)(COUNT_PIXELS, x + p * step, row_stride, step, weight, kernel_rows, run, out + p * padded + n,
                        padded);
        for (; p + 2 <= num; p += 2)
            NAME(count)(2, x + p * step, row_stride, step, weight, kernel_rows, run, out + p * padded + n, padded);
        for (; p < num; p++)
            NAME(count)(1, x + p * step, row_stride, step, weight, kernel_rows, run, out + p * padded + n, padded);
    }
}

TARGET static void NAME(convolve_row)(struct packed_network *n, const struct operation *o, int64_t y, int64_t first,
                                      int64_t num, void *scratch) {
    const int64_t wide = o->fields[KIND] == BINARY_CONV ? DIFFER_WIDE : DOT_VECTORS * VF;
#ifdef HAS_FUSED
    convolve_row(n, o, y, first, num, scratch, wide, NAME(dot), NAME(differ), NAME(fused), NAME(mask));
#else
    convolve_row(n, o, y, first, num, scratch, wide, NAME(dot), NAME(differ), 0, NAME(mask));
#endif
}

TARGET static void NAME(map_row)(struct packed_network *n, const struct operation *o, int64_t y) {
    map_row(n, o, y, NAME(mask));
}

#undef NAME
#undef TARGET
#undef COUNT_PIXELS
#undef DIFFER_WIDE
#undef DOT_PIXELS
#undef DOT_VECTORS
#undef VF
#undef vf
#undef LOADF
#undef STOREF
#undef SPLATF
#undef FMAF
#undef HAS_FUSED
