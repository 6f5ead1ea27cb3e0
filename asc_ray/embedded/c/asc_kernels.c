#include "asc_kernels.h"

#include <math.h>

#if defined(__ARM_FEATURE_DSP)
#include <arm_acle.h>
#endif

/* Add the products of `count` values with two rows of weights to sums[0] and sums[1]. */
static inline void asc_dot2(const uint8_t *x, const int8_t *w0, const int8_t *w1, int count, int32_t sums[2])
{
    int32_t sum0 = sums[0], sum1 = sums[1];
    int k = 0;
#if defined(__ARM_FEATURE_DSP)
    for (; k + 4 <= count; k += 4) {
        uint32_t values, weights0, weights1;
        memcpy(&values, x + k, 4);
        memcpy(&weights0, w0 + k, 4);
        memcpy(&weights1, w1 + k, 4);
        uint16x2_t even = __uxtb16(values), odd = __uxtb16(values >> 8 | values << 24);
        sum0 = __smlad((int16x2_t)even, __sxtb16((int8x4_t)weights0), sum0);
        sum1 = __smlad((int16x2_t)even, __sxtb16((int8x4_t)weights1), sum1);
        sum0 = __smlad((int16x2_t)odd, __sxtb16((int8x4_t)(weights0 >> 8 | weights0 << 24)), sum0);
        sum1 = __smlad((int16x2_t)odd, __sxtb16((int8x4_t)(weights1 >> 8 | weights1 << 24)), sum1);
    }
#endif
    for (; k < count; k++) {
        sum0 += x[k] * w0[k];
        sum1 += x[k] * w1[k];
    }
    sums[0] = sum0;
    sums[1] = sum1;
}

/* Copy what a kernel covers at an output's place; beyond the edges lies the zero point. */
static void asc_gather(const asc_convolution *l, const uint8_t *x, int out_row, int out_column, uint8_t *patch)
{
    for (int i = 0; i < l->kernel_height; i++) {
        int row = out_row * l->stride_height - l->top + i;
        for (int j = 0; j < l->kernel_width; j++, patch += l->channels) {
            int column = out_column * l->stride_width - l->left + j;
            if (row < 0 || row >= l->height || column < 0 || column >= l->width)
                memset(patch, l->zero, (size_t)l->channels);
            else
                memcpy(patch, x + (row * l->width + column) * l->channels, (size_t)l->channels);
        }
    }
}

void asc_convolve(const asc_convolution *l, const uint8_t *x, uint8_t *y, const int8_t *weights,
                  const int32_t *bias, const float *multiplier, uint8_t *patch)
{
    int positions = l->out_height * l->out_width, count = l->kernel_height * l->kernel_width * l->channels;
    int pointwise = count == l->channels && l->stride_height == 1 && l->stride_width == 1;
    int backwards = x == y && l->out_channels > l->channels; /* so that no input is overwritten before it is read */

    for (int n = 0; n < positions; n++) {
        int position = backwards ? positions - 1 - n : n;
        uint8_t *out = y + position * l->out_channels;
        const uint8_t *values = patch;
        if (!pointwise)
            asc_gather(l, x, position / l->out_width, position % l->out_width, patch);
        else if (x == y)
            memcpy(patch, x + position * count, (size_t)count);
        else
            values = x + position * count;
        for (int c = 0; c < l->out_channels; c += 2) {
            int other = c + 1 < l->out_channels ? c + 1 : c;
            int32_t sums[2] = {bias[c], bias[other]};
            asc_dot2(values, weights + c * count, weights + other * count, count, sums);
            out[c] = asc_rounded((float)sums[0] * multiplier[c], l->out_zero, l->low);
            out[other] = asc_rounded((float)sums[1] * multiplier[other], l->out_zero, l->low);
        }
    }
}

void asc_filter(const asc_convolution *l, const uint8_t *x, uint8_t *y, const int8_t *weights,
                const int32_t *bias, const float *multiplier, uint8_t *rows)
{
    int channels = l->channels, padded = (l->out_width - 1) * l->stride_width + 3;
    int row_bytes = padded * channels, next = 0;

    for (int i = 0; i < l->out_height; i++) {
        for (; next < i * l->stride_height + 3; next++) {
            uint8_t *own = rows + next % 3 * row_bytes;
            int row = next - l->top;
            int right = padded - l->left < l->width ? padded - l->left : l->width;
            memset(own, l->zero, (size_t)row_bytes);
            if (row >= 0 && row < l->height)
                memcpy(own + l->left * channels, x + row * l->width * channels, (size_t)(right * channels));
        }
        const uint8_t *row0 = rows + i * l->stride_height % 3 * row_bytes;
        const uint8_t *row1 = rows + (i * l->stride_height + 1) % 3 * row_bytes;
        const uint8_t *row2 = rows + (i * l->stride_height + 2) % 3 * row_bytes;
        for (int j = 0; j < l->out_width; j++) {
            int at = j * l->stride_width * channels;
            const uint8_t *a = row0 + at, *b = row1 + at, *d = row2 + at;
            const int8_t *w = weights;
            for (int c = 0; c < channels; c++, w += 9) {
                int32_t sum = bias[c];
                sum += a[c] * w[0] + a[c + channels] * w[1] + a[c + 2 * channels] * w[2];
                sum += b[c] * w[3] + b[c + channels] * w[4] + b[c + 2 * channels] * w[5];
                sum += d[c] * w[6] + d[c + channels] * w[7] + d[c + 2 * channels] * w[8];
                *y++ = asc_rounded((float)sum * multiplier[c], l->out_zero, l->low);
            }
        }
    }
}

void asc_add(const uint8_t *a, const uint8_t *b, uint8_t *y, int count, float a_ratio, float b_ratio, float fixed,
             int low)
{
    for (int n = 0; n < count; n++)
        y[n] = asc_rounded((float)a[n] * a_ratio + ((float)b[n] * b_ratio + fixed), 0, low);
}

void asc_max_pool(const uint8_t *x, uint8_t *y, int rows, int columns, int channels, int height, int width,
                  const uint8_t *table, int first, int step)
{
    for (int row = 0; row + height <= rows; row += height)
        for (int column = 0; column + width <= columns; column += width, y += channels)
            for (int c = first; c < channels; c += step) {
                uint8_t most = 0;
                for (int i = 0; i < height; i++)
                    for (int j = 0; j < width; j++) {
                        uint8_t value = x[((row + i) * columns + column + j) * channels + c];
                        value = table ? table[value] : value;
                        most = value > most ? value : most;
                    }
                y[c] = most;
            }
}

/* The sum of a channel's values and of their squares. */
static void asc_sums(const uint8_t *x, int positions, int channels, int channel, uint32_t *sum, uint32_t *squares)
{
    *sum = *squares = 0;
    for (const uint8_t *value = x + channel; value < x + positions * channels; value += channels) {
        *sum += *value;
        *squares += (uint32_t)*value * *value;
    }
}

void asc_normalize(const asc_normalization *l, const uint8_t *x, uint8_t *y, float residual, float inner,
                   float gain, float eps, uint8_t table[256])
{
    int positions = l->height * l->width;

    for (int c = 0; c < l->channels; c++) {
        uint32_t sum, squares;
        asc_sums(x, positions, l->channels, c, &sum, &squares);
        float step = inner * l->step;
        float mean = ((float)sum / (float)positions - (float)l->zero) * step;
        int64_t spread = (int64_t)positions * squares - (int64_t)sum * sum;
        float variance = (float)spread / ((float)positions * (float)positions) * (step * step);
        float slope = gain / sqrtf(variance + eps);
        float shift = mean * slope;
        for (int value = 0; value < 256; value++) {
            float own = (float)(value - l->zero) * l->step;
            float normalized = own * inner * slope - shift;
            table[value] = asc_rounded((own * residual + normalized) / l->out_step, l->out_zero, l->low);
        }
        asc_max_pool(x, y, l->height, l->width, l->channels, l->pool_height, l->pool_width, table, c, l->channels);
    }
}

void asc_respond(const asc_normalization *l, const uint8_t *x, uint8_t *y, float gamma, float beta, float eps,
                 float *norms, uint8_t table[256])
{
    int positions = l->height * l->width;
    float mean = 0.0f;

    for (int c = 0; c < l->channels; c++) {
        uint32_t sum, squares;
        asc_sums(x, positions, l->channels, c, &sum, &squares);
        int64_t energy = squares + (int64_t)positions * l->zero * l->zero - (int64_t)2 * l->zero * sum;
        norms[c] = sqrtf((float)energy) * l->step;
        mean += norms[c];
    }
    mean = mean / (float)l->channels + eps;
    for (int c = 0; c < l->channels; c++) {
        float relative = norms[c] / mean;
        for (int value = 0; value < 256; value++) {
            float own = (float)(value - l->zero) * l->step;
            table[value] = asc_rounded((own + gamma * (own * relative) + beta) / l->out_step, l->out_zero, l->low);
        }
        asc_max_pool(x, y, l->height, l->width, l->channels, l->pool_height, l->pool_width, table, c, l->channels);
    }
}

void asc_mean(const uint8_t *x, uint8_t *y, int positions, int channels, int zero, float multiplier, int out_zero)
{
    for (int c = 0; c < channels; c++) {
        int32_t sum = -zero * positions;
        for (int n = 0; n < positions; n++)
            sum += x[n * channels + c];
        y[c] = asc_rounded((float)sum * multiplier, out_zero, 0);
    }
}

void asc_mean_logits(const uint8_t *x, float *logits, int positions, int channels, int zero, float step)
{
    for (int c = 0; c < channels; c++) {
        int32_t sum = -zero * positions;
        for (int n = 0; n < positions; n++)
            sum += x[n * channels + c];
        logits[c] = (float)sum * step / (float)positions;
    }
}

void asc_linear(const uint8_t *x, float *logits, int count, int outputs, const int8_t *weights,
                const int32_t *bias, const float *multiplier)
{
    for (int c = 0; c < outputs; c++) {
        int32_t sum = bias[c];
        for (int k = 0; k < count; k++)
            sum += x[k] * weights[c * count + k];
        logits[c] = (float)sum * multiplier[c];
    }
}
