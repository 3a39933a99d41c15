/* Kernels of `bitfleet export --format c`: c_format.py copies those that a network needs, so each part stands between blank lines
 * and is known by the name that it defines.
 *
 * C99 without a library, except sqrt where a network has LayerNorm and expf where it has a sigmoid. Images are [height][width][channels]; a pixel of signs is
 * whole words of 32 bits, least significant bit first, bit 1 = +1, bits behind the last channel 0. Floats are rounded after every
 * operation, as in packed.c, if the compiler does not contract a * b + c: -ffp-contract=off, which gcc's -std=c99 implies. */
#include <math.h>
#include <stdint.h>

/* An element of a buffer: a float, an integer sum of products, or 32 signs. */
union value {
    float real;
    int32_t sum;
    uint32_t signs;
};

/* How a convolution or a pool reads an image. If padding counts, it is +1 of a binary convolution and 0 of a mean. */
struct window {
    int32_t height, width, channels, kernel_height, kernel_width, stride, top, left, out_height, out_width, outputs;
    int padding_counts;
};

/* What becomes of a value, in this order; 0 where it has none. First a ReLU, then per channel factor, offset, what is added, shift;
 * another ReLU, the factor of negative values, what is added after it; and the signs, of the value plus sign_shift. */
struct finish {
    int relu_first;
    const float *factor, *offset;
    const union value *added;
    const float *shift;
    int relu;
    const float *slope, *after;
    union value *signs;
    const float *sign_shift;
};

/* Channels are set in order. */
static void set_sign(union value *pixel, int32_t channel, int is_positive)
{
    union value *word = pixel + channel / 32;
    if (channel % 32 == 0) word->signs = 0;
    if (is_positive) word->signs |= (uint32_t)1 << (channel % 32);
}

static void store(float value, const struct finish *f, int32_t pixel, int32_t channel, int32_t channels, union value *out)
{
    const int32_t at = pixel * channels + channel;
    if (f->relu_first && value < 0.0f) value = 0.0f;
    if (f->factor) value *= f->factor[channel];
    if (f->offset) value += f->offset[channel];
    if (f->added) value += f->added[at].real;
    if (f->shift) value += f->shift[channel];
    if (f->relu && value < 0.0f) value = 0.0f;
    if (f->slope && value < 0.0f) value *= f->slope[channel];
    if (f->after) value += f->after[channel];
    out[at].real = value;
    if (f->sign_shift) value += f->sign_shift[channel];
    if (f->signs) set_sign(f->signs + pixel * ((channels + 31) / 32), channel, !(value < 0.0f));
}

static void normalize(const uint8_t *pixels, int32_t num_pixels, int32_t channels, const float *mean, const float *deviation,
                      const struct finish *f, union value *out)
{
    for (int32_t pixel = 0; pixel < num_pixels; pixel++)
        for (int32_t c = 0; c < channels; c++)
            store(((float)pixels[pixel * channels + c] - mean[c]) / deviation[c], f, pixel, c, channels, out);
}

/* weight: [outputs][kernel height][kernel width][channels] */
static void conv(const union value *in, const float *weight, const struct window *w, const struct finish *f, union value *out)
{
    for (int32_t pixel = 0; pixel < w->out_height * w->out_width; pixel++) {
        const int32_t top = pixel / w->out_width * w->stride - w->top, left = pixel % w->out_width * w->stride - w->left;
        const float *factor = weight;
        for (int32_t output = 0; output < w->outputs; output++) {
            float sum = 0.0f;
            for (int32_t y = top; y < top + w->kernel_height; y++)
                for (int32_t x = left; x < left + w->kernel_width; x++, factor += w->channels) {
                    if (y < 0 || y >= w->height || x < 0 || x >= w->width) continue;
                    for (int32_t c = 0; c < w->channels; c++)
                        sum += in[(y * w->width + x) * w->channels + c].real * factor[c];
                }
            store(sum, f, pixel, output, w->outputs, out);
        }
    }
}

/* One filter per channel; weight: [kernel height][kernel width][channels] */
static void depthwise(const union value *in, const float *weight, const struct window *w, const struct finish *f, union value *out)
{
    for (int32_t pixel = 0; pixel < w->out_height * w->out_width; pixel++) {
        const int32_t top = pixel / w->out_width * w->stride - w->top, left = pixel % w->out_width * w->stride - w->left;
        for (int32_t c = 0; c < w->channels; c++) {
            float sum = 0.0f;
            const float *factor = weight + c;
            for (int32_t y = top; y < top + w->kernel_height; y++)
                for (int32_t x = left; x < left + w->kernel_width; x++, factor += w->channels) {
                    if (y < 0 || y >= w->height || x < 0 || x >= w->width) continue;
                    sum += in[(y * w->width + x) * w->channels + c].real * *factor;
                }
            store(sum, f, pixel, c, w->channels, out);
        }
    }
}

/* As conv, with weights +-1; weight: [outputs][words of kernel height * kernel width * channels] */
static void conv_of_signs(const union value *in, const uint32_t *weight, const struct window *w, const struct finish *f,
                          union value *out)
{
    const int32_t words = (w->kernel_height * w->kernel_width * w->channels + 31) / 32;
    for (int32_t pixel = 0; pixel < w->out_height * w->out_width; pixel++) {
        const int32_t top = pixel / w->out_width * w->stride - w->top, left = pixel % w->out_width * w->stride - w->left;
        for (int32_t output = 0; output < w->outputs; output++) {
            float sum = 0.0f;
            uint32_t bit = (uint32_t)(output * words) * 32u;
            for (int32_t y = top; y < top + w->kernel_height; y++)
                for (int32_t x = left; x < left + w->kernel_width; x++)
                    for (int32_t c = 0; c < w->channels; c++, bit++) {
                        if (y < 0 || y >= w->height || x < 0 || x >= w->width) continue;
                        const float value = in[(y * w->width + x) * w->channels + c].real;
                        sum += weight[bit / 32] >> (bit % 32) & 1 ? value : -value;
                    }
            store(sum, f, pixel, output, w->outputs, out);
        }
    }
}

static int32_t count_bits(uint32_t x)
{
    x -= x >> 1 & 0x55555555u;
    x = (x & 0x33333333u) + (x >> 2 & 0x33333333u);
    x = (x + (x >> 4)) & 0x0f0f0f0fu;
    return (int32_t)((uint32_t)(x * 0x01010101u) >> 24);
}

/* Sum of products of an output, whose weight is [kernel height][kernel width][words]; pixels outside of the image are no products,
 * or +1. */
static int32_t sum_of_products(const union value *in, const uint32_t *weight, const struct window *w, int32_t pixel)
{
    const int32_t top = pixel / w->out_width * w->stride - w->top, left = pixel % w->out_width * w->stride - w->left;
    const int32_t words = (w->channels + 31) / 32;
    int32_t num_products = 0, differing = 0;
    for (int32_t y = top; y < top + w->kernel_height; y++)
        for (int32_t x = left; x < left + w->kernel_width; x++, weight += words) {
            if (y >= 0 && y < w->height && x >= 0 && x < w->width) {
                for (int32_t i = 0; i < words; i++) differing += count_bits(in[(y * w->width + x) * words + i].signs ^ weight[i]);
            } else if (w->padding_counts) {
                differing += w->channels;
                for (int32_t i = 0; i < words; i++) differing -= count_bits(weight[i]);
            } else {
                continue;
            }
            num_products += w->channels;
        }
    return num_products - 2 * differing;
}

static void binary_conv(const union value *in, const uint32_t *weight, const struct window *w, const struct finish *f,
                        union value *out)
{
    const int32_t step = w->kernel_height * w->kernel_width * ((w->channels + 31) / 32);
    for (int32_t pixel = 0; pixel < w->out_height * w->out_width; pixel++)
        for (int32_t output = 0; output < w->outputs; output++)
            store((float)sum_of_products(in, weight + output * step, w, pixel), f, pixel, output, w->outputs, out);
}

static void binary_conv_to_sums(const union value *in, const uint32_t *weight, const struct window *w, union value *out)
{
    const int32_t step = w->kernel_height * w->kernel_width * ((w->channels + 31) / 32);
    for (int32_t pixel = 0; pixel < w->out_height * w->out_width; pixel++)
        for (int32_t output = 0; output < w->outputs; output++)
            out[pixel * w->outputs + output].sum = sum_of_products(in, weight + output * step, w, pixel);
}

/* The sign is +1 where sum * direction >= threshold. */
static void binary_conv_to_signs(const union value *in, const uint32_t *weight, const struct window *w, const int32_t *threshold,
                                 const int8_t *direction, union value *out)
{
    const int32_t step = w->kernel_height * w->kernel_width * ((w->channels + 31) / 32);
    for (int32_t pixel = 0; pixel < w->out_height * w->out_width; pixel++)
        for (int32_t output = 0; output < w->outputs; output++) {
            const int32_t sum = sum_of_products(in, weight + output * step, w, pixel);
            set_sign(out + pixel * ((w->outputs + 31) / 32), output, sum * direction[output] >= threshold[output]);
        }
}

static void threshold_sums(const union value *in, int32_t num_pixels, int32_t channels, const int32_t *threshold,
                           const int8_t *direction, union value *out)
{
    for (int32_t pixel = 0; pixel < num_pixels; pixel++)
        for (int32_t c = 0; c < channels; c++) {
            const int32_t sum = in[pixel * channels + c].sum;
            set_sign(out + pixel * ((channels + 31) / 32), c, sum * direction[c] >= threshold[c]);
        }
}

static void sign(const union value *in, int32_t num_pixels, int32_t channels, union value *out)
{
    for (int32_t pixel = 0; pixel < num_pixels; pixel++)
        for (int32_t c = 0; c < channels; c++)
            set_sign(out + pixel * ((channels + 31) / 32), c, !(in[pixel * channels + c].real < 0.0f));
}

static void affine(const union value *in, int32_t num_pixels, int32_t channels, const struct finish *f, union value *out)
{
    for (int32_t pixel = 0; pixel < num_pixels; pixel++)
        for (int32_t c = 0; c < channels; c++) store(in[pixel * channels + c].real, f, pixel, c, channels, out);
}

static void affine_of_sums(const union value *in, int32_t num_pixels, int32_t channels, const struct finish *f, union value *out)
{
    for (int32_t pixel = 0; pixel < num_pixels; pixel++)
        for (int32_t c = 0; c < channels; c++) store((float)in[pixel * channels + c].sum, f, pixel, c, channels, out);
}

static void sign_after_offset(const union value *in, int32_t num_pixels, int32_t channels, const float *offset, union value *out)
{
    for (int32_t pixel = 0; pixel < num_pixels; pixel++)
        for (int32_t c = 0; c < channels; c++)
            set_sign(out + pixel * ((channels + 31) / 32), c, !(in[pixel * channels + c].real + offset[c] < 0.0f));
}

/* Times a factor per channel, which is an image of one pixel. */
static void scale(const union value *in, int is_sums, const union value *factor, int32_t num_pixels, int32_t channels,
                  const struct finish *f, union value *out)
{
    for (int32_t pixel = 0; pixel < num_pixels; pixel++, in += channels)
        for (int32_t c = 0; c < channels; c++)
            store((is_sums ? (float)in[c].sum : in[c].real) * factor[c].real, f, pixel, c, channels, out);
}

static void sigmoid(const union value *in, int32_t num_pixels, int32_t channels, const struct finish *f, union value *out)
{
    for (int32_t pixel = 0; pixel < num_pixels; pixel++)
        for (int32_t c = 0; c < channels; c++)
            store(1.0f / (1.0f + expf(-in[pixel * channels + c].real)), f, pixel, c, channels, out);
}

/* The channels of two images behind each other. */
static void concatenate(const union value *in, const union value *other, int32_t num_pixels, int32_t channels,
                        int32_t other_channels, const struct finish *f, union value *out)
{
    const int32_t all = channels + other_channels;
    for (int32_t pixel = 0; pixel < num_pixels; pixel++, in += channels, other += other_channels)
        for (int32_t c = 0; c < all; c++) store(c < channels ? in[c].real : other[c - channels].real, f, pixel, c, all, out);
}

/* Over the channels of a pixel; in double, because a variance of large values cancels. */
static void layer_norm(const union value *in, int is_sums, int32_t num_pixels, int32_t channels, float epsilon,
                       const struct finish *f, union value *out)
{
    for (int32_t pixel = 0; pixel < num_pixels; pixel++, in += channels) {
        double mean = 0.0, variance = 0.0;
        for (int32_t c = 0; c < channels; c++) mean += is_sums ? (double)in[c].sum : (double)in[c].real;
        mean /= (double)channels;
        for (int32_t c = 0; c < channels; c++) {
            const double difference = (is_sums ? (double)in[c].sum : (double)in[c].real) - mean;
            variance += difference * difference;
        }
        const float scale = (float)(1.0 / sqrt(variance / (double)channels + (double)epsilon)), center = (float)mean;
        for (int32_t c = 0; c < channels; c++)
            store(((is_sums ? (float)in[c].sum : in[c].real) - center) * scale, f, pixel, c, channels, out);
    }
}

static void max_pool(const union value *in, const struct window *w, const struct finish *f, union value *out)
{
    for (int32_t pixel = 0; pixel < w->out_height * w->out_width; pixel++) {
        const int32_t top = pixel / w->out_width * w->stride - w->top, left = pixel % w->out_width * w->stride - w->left;
        for (int32_t c = 0; c < w->channels; c++) {
            float best = 0.0f;
            int is_first = 1;
            for (int32_t y = top; y < top + w->kernel_height; y++)
                for (int32_t x = left; x < left + w->kernel_width; x++) {
                    if (y < 0 || y >= w->height || x < 0 || x >= w->width) continue;
                    const float value = in[(y * w->width + x) * w->channels + c].real;
                    if (is_first || !(value <= best)) best = value;
                    is_first = 0;
                }
            store(best, f, pixel, c, w->channels, out);
        }
    }
}

static void max_pool_of_sums(const union value *in, const struct window *w, union value *out)
{
    for (int32_t pixel = 0; pixel < w->out_height * w->out_width; pixel++) {
        const int32_t top = pixel / w->out_width * w->stride - w->top, left = pixel % w->out_width * w->stride - w->left;
        for (int32_t c = 0; c < w->channels; c++) {
            int32_t best = INT32_MIN;
            for (int32_t y = top; y < top + w->kernel_height; y++)
                for (int32_t x = left; x < left + w->kernel_width; x++) {
                    if (y < 0 || y >= w->height || x < 0 || x >= w->width) continue;
                    const int32_t sum = in[(y * w->width + x) * w->channels + c].sum;
                    if (sum > best) best = sum;
                }
            out[pixel * w->channels + c].sum = best;
        }
    }
}

/* Mean of the pixels inside the image; if padding counts, of the window, with zeros outside. */
static void average_pool(const union value *in, const struct window *w, const struct finish *f, union value *out)
{
    for (int32_t pixel = 0; pixel < w->out_height * w->out_width; pixel++) {
        const int32_t top = pixel / w->out_width * w->stride - w->top, left = pixel % w->out_width * w->stride - w->left;
        for (int32_t c = 0; c < w->channels; c++) {
            float sum = 0.0f;
            int32_t count = 0;
            for (int32_t y = top; y < top + w->kernel_height; y++)
                for (int32_t x = left; x < left + w->kernel_width; x++) {
                    if (y < 0 || y >= w->height || x < 0 || x >= w->width) continue;
                    sum += in[(y * w->width + x) * w->channels + c].real;
                    count++;
                }
            if (w->padding_counts) count = w->kernel_height * w->kernel_width;
            store(sum / (float)count, f, pixel, c, w->channels, out);
        }
    }
}

static void mean(const union value *in, int32_t num_pixels, int32_t channels, const struct finish *f, union value *out)
{
    for (int32_t c = 0; c < channels; c++) {
        float sum = 0.0f;
        for (int32_t pixel = 0; pixel < num_pixels; pixel++) sum += in[pixel * channels + c].real;
        store(sum / (float)num_pixels, f, 0, c, channels, out);
    }
}
