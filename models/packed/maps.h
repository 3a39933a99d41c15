/* Rows of all operations but CONV and BINARY_CONV, for packed.c. */

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
    const int64_t top = y * o->fields[STRIDE] - o->fields[TOP], left = x * o->fields[STRIDE] - o->fields[LEFT];
    const int64_t bottom = top + o->fields[KERNEL_H], right = left + o->fields[KERNEL_W], channels = s->channels;
    const int64_t y0 = top > 0 ? top : 0, y1 = bottom < s->height ? bottom : s->height;
    const int64_t x0 = left > 0 ? left : 0, x1 = right < s->width ? right : s->width;
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
    const int64_t inside = (y1 - y0) * (x1 - x0), all = (int64_t)o->fields[KERNEL_H] * o->fields[KERNEL_W];
    const float count = (float)(o->fields[FLAGS] & COUNT_PADDING ? all : inside);
    if (o->fields[KIND] == AVG_POOL)
        for (int64_t c = 0; c < channels; c++) out[c] /= count;
}

/* One filter per channel; weight: [taps][channels]. What is added may be the target itself. */
INLINE void depthwise_pixel(struct packed_network *n, const struct operation *o, int64_t y, int64_t x,
                            const float *added, float *out, uint64_t *signs, mask_function *mask) {
    const struct buffer *s = o->source;
    const int64_t top = y * o->fields[STRIDE] - o->fields[TOP], left = x * o->fields[STRIDE] - o->fields[LEFT];
    const int64_t kernel_h = o->fields[KERNEL_H], kernel_w = o->fields[KERNEL_W], channels = s->channels;
    const float *weight = (const float *)n->tensors[o->fields[WEIGHT]].data;
    for (int64_t c = 0; c < channels; c += WORD) {
        float word[WORD] = {0};
        const int64_t most = channels - c < WORD ? channels - c : WORD;
        for (int64_t i = 0; i < kernel_h; i++)
            for (int64_t j = 0; j < kernel_w; j++) {
                if (top + i < 0 || top + i >= s->height || left + j < 0 || left + j >= s->width) continue;
                const float *in = (const float *)values_of(n, s) + ((top + i) * s->width + left + j) * channels + c;
                const float *factor = weight + (i * kernel_w + j) * channels + c;
                for (int64_t k = 0; k < most; k++) word[k] += in[k] * factor[k];
            }
        finish(o, word, 0, 0, added ? added + c : 0, c, most, out + c, signs ? signs + c / WORD : 0, mask);
    }
}

/* A pixel of `values` or `sums`, times a factor per channel if `scale` is not NULL. What is added may
 * be the target itself. */
INLINE void scale_pixel(const struct operation *o, const float *values, const int32_t *sums, const float *scale,
                        const float *added, float *out, uint64_t *signs, mask_function *mask) {
    const int64_t channels = o->source->channels;
    for (int64_t c = 0; c < channels; c += WORD) {
        float word[WORD];
        const int64_t most = channels - c < WORD ? channels - c : WORD;
        for (int64_t k = 0; k < most; k++) word[k] = sums ? (float)sums[c + k] : values[c + k];
        for (int64_t k = 0; scale && k < most; k++) word[k] *= scale[c + k];
        finish(o, word, 0, 0, added ? added + c : 0, c, most, out + c, signs ? signs + c / WORD : 0, mask);
    }
}

/* A pixel of SIGN: signs after the offset, if there is one. */
INLINE void sign_pixel(const struct operation *o, const float *values, uint64_t *bits, mask_function *mask) {
    const int64_t channels = o->source->channels;
    if (!o->offset) {
        pack(values, channels, bits, mask);
        return;
    }
    for (int64_t c = 0; c < channels; c += WORD) {
        float word[WORD];
        const int64_t most = channels - c < WORD ? channels - c : WORD;
        for (int64_t k = 0; k < most; k++) word[k] = values[c + k] + o->offset[c + k];
        pack(word, most, bits + c / WORD, mask);
    }
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
            for (int64_t i = 0; i < numel; i++)
                out[i] = ((float)((const uint8_t *)n->pixels)[row + i] - mean[i]) / deviation[i];
        else
            for (int64_t i = 0; i < numel; i++) out[i] = (((const float *)n->pixels)[row + i] - mean[i]) / deviation[i];
        for (int64_t x = 0; o->signs && x < s->width; x++)
            pack_result(o, out + x * num, 0, num,
                        (uint64_t *)values_of(n, o->signs) + (y * s->width + x) * t->words, mask);
        return;
    }
    for (int64_t x = 0; x < t->width; x++) {
        const int64_t pixel = y * t->width + x, at = pixel * num;
        float *out = (float *)values_of(n, t) + (t->type == FLOATS ? pixel * t->channels : 0);
        const float *in = (const float *)values_of(n, s) + at;
        const float *other = o->other ? (const float *)values_of(n, o->other) : 0;
        const float *added = other && o->fields[KIND] != SCALE ? other + pixel * o->other->channels : 0;
        const int32_t *sums = (const int32_t *)in;
        uint64_t *bits = (uint64_t *)values_of(n, t) + pixel * t->words;
        uint64_t *signs = o->signs ? (uint64_t *)values_of(n, o->signs) + pixel * t->words : 0;
        switch (o->fields[KIND]) {
        case MAX_POOL:
        case AVG_POOL:
            pool_pixel(n, o, y, x);
            if (signs) pack_result(o, out, 0, num, signs, mask);
            break;
        case CONCAT:
            memcpy(out, in, num * sizeof *out);
            memcpy(out + num, added, o->other->channels * sizeof *out);
            if (signs) pack_result(o, out, 0, t->channels, signs, mask);
            break;
        case SIGMOID:
            for (int64_t c = 0; c < num; c++) out[c] = 1.0f / (1.0f + expf(-in[c]));
            if (signs) pack_result(o, out, 0, num, signs, mask);
            break;
        case DEPTHWISE:
            depthwise_pixel(n, o, y, x, added, out, signs, mask);
            break;
        case SCALE:
            scale_pixel(o, in, s->type == SUMS ? sums : 0, other, 0, out, signs, mask);
            break;
        case SIGN:
            sign_pixel(o, in, bits, mask);
            break;
        case THRESHOLD:
            compare(o, sums, 0, num, bits, mask);
            break;
        case LAYER_NORM:
            if (s->type == SUMS)
                for (int64_t c = 0; c < num; c++) out[c] = (float)sums[c];
            else
                memcpy(out, in, num * sizeof *out);
            normalize_pixel(n, o, out);
            finish(o, out, 0, 0, 0, 0, num, out, signs, mask);
            break;
        default: /* AFFINE, ADD */
            if (s->type == SUMS)
                scale_pixel(o, 0, sums, 0, added, out, signs, mask);
            else
                finish(o, in, 0, 0, added, 0, num, out, signs, mask);
        }
    }
}
