/* The layers of the network on 8-bit values, as onnxruntime's integer kernels compute them, to the bit.
 *
 * A value is uint8, stored by row, column, channel: x[(row * width + column) * channels + channel]. Weights are int8 with
 * the zero point 0, sums are int32, and a sum becomes an 8-bit value by one float32 multiplication, rounded to the nearest
 * even number. Compile with -ffp-contract=off: a fused multiplication and addition rounds once where onnxruntime rounds
 * twice.
 */
#ifndef ASC_KERNELS_H
#define ASC_KERNELS_H

#include <float.h>
#include <stdint.h>
#include <string.h>

#if FLT_EVAL_METHOD != 0
#error "float expressions must be evaluated in float: compile for a core with float registers, or with software floats"
#endif

#if defined(__FAST_MATH__)
#error "compile without -ffast-math: floats must round as in onnxruntime"
#endif

/* A convolution, full or depthwise. `low`: the least output, which is the zero point behind a ReLU. */
typedef struct {
    int height, width, channels;
    int out_height, out_width, out_channels;
    int kernel_height, kernel_width, stride_height, stride_width, top, left;
    int zero, out_zero, low;
} asc_convolution;

/* A grid, and that of the output behind a normalization and a pool of height x width positions. */
typedef struct {
    int height, width, channels, pool_height, pool_width;
    float step;
    int zero;
    float out_step;
    int out_zero, low;
} asc_normalization;

/* Round to the nearest even number; |x| < 2^22. */
static inline int32_t asc_round(float x)
{
    float shifted = x + 12582912.0f;
    int32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    return bits - 0x4B400000;
}

/* Return x in steps, cut off to low..255. */
static inline uint8_t asc_rounded(float x, int zero, int low)
{
    float least = (float)(low - zero), most = (float)(255 - zero);
    x = x < least ? least : x;
    x = x > most ? most : x;
    return (uint8_t)(asc_round(x) + zero);
}

/* weights: by output channel, then row, column and channel of the kernel. bias: less the zero point's products.
 * patch: room for one output's inputs. A kernel of 1x1 without a stride may have y == x. */
void asc_convolve(const asc_convolution *l, const uint8_t *x, uint8_t *y, const int8_t *weights,
                  const int32_t *bias, const float *multiplier, uint8_t *patch);

/* Depthwise, with a kernel of 3x3. weights: nine for each channel. rows: room for three rows with their padding, so y == x
 * is allowed. */
void asc_filter(const asc_convolution *l, const uint8_t *x, uint8_t *y, const int8_t *weights,
                const int32_t *bias, const float *multiplier, uint8_t *rows);

/* y = a + b, each on a grid of its own: `a_ratio` is a's step in steps of y. y may be a or b. */
void asc_add(const uint8_t *a, const uint8_t *b, uint8_t *y, int count, float a_ratio, float b_ratio, float fixed,
             int low);

/* The largest of each window of height x width positions. y may be x. */
void asc_max_pool(const uint8_t *x, uint8_t *y, int rows, int columns, int channels, int height, int width,
                  const uint8_t *table, int first, int step);

/* residual * x + gain * IN(inner * x), and the pool. y may be x. A channel's statistics are exact, because they are sums of
 * integers, and each of the 256 values is normalized once. */
void asc_normalize(const asc_normalization *l, const uint8_t *x, uint8_t *y, float residual, float inner,
                   float gain, float eps, uint8_t table[256]);

/* x + gamma * x * g / mean(g) + beta, g each channel's norm, and the pool. y may be x. */
void asc_respond(const asc_normalization *l, const uint8_t *x, uint8_t *y, float gamma, float beta, float eps,
                 float *norms, uint8_t table[256]);

/* The mean of each channel. multiplier: x's step in steps of y, over the number of positions. */
void asc_mean(const uint8_t *x, uint8_t *y, int positions, int channels, int zero, float multiplier, int out_zero);

/* The mean of each channel, as a float. */
void asc_mean_logits(const uint8_t *x, float *logits, int positions, int channels, int zero, float step);

/* weights: `count` for each of the outputs. */
void asc_linear(const uint8_t *x, float *logits, int count, int outputs, const int8_t *weights,
                const int32_t *bias, const float *multiplier);

#endif
