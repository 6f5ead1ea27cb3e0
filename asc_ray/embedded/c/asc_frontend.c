/* The log-mel front end, in float32.
 *
 * x[t] - 0.97 x[t-1]  ->  centred Fourier transform, power  ->  Kaldi mel bank  ->  log(mel + 1e-5)  ->  (x + 4.5) / 5
 *
 * It computes what asc_ray.runtime.frontend computes in NumPy, with sums in another order.
 */
#define ASC_FRONTEND_TABLES
#include "asc_frontend.h"

#include "asc_kernels.h"

#define POINTS (ASC_N_FFT / 2) /* of the complex transform, whose real parts are the even samples */
#define QUARTER (ASC_N_FFT / 4)
#define LENGTH (ASC_SAMPLES - 1) /* pre-emphasis takes one sample */

/* Return sample n of a frame behind pre-emphasis and window, in 16-bit steps; the edges reflect. */
static float asc_sample(const int16_t *samples, int first, int n)
{
    int at = first + n < 0 ? -(first + n) : first + n;
    at = at < LENGTH ? at : 2 * (LENGTH - 1) - at;
    return ((float)samples[at + 1] - 0.97f * (float)samples[at]) * asc_window[n];
}

/* Write samples n and n + 1 of a frame to pair[0] and pair[1]. */
static inline void asc_pair(const int16_t *samples, int first, int n, float pair[2])
{
    if (n >= ASC_WINDOW) {
        pair[0] = pair[1] = 0.0f;
    } else if (first >= 0 && first + ASC_WINDOW < LENGTH) {
        const int16_t *at = samples + first + n;
        float a = (float)at[0], b = (float)at[1], c = (float)at[2];
        pair[0] = (b - 0.97f * a) * asc_window[n];
        pair[1] = (c - 0.97f * b) * asc_window[n + 1];
    } else {
        pair[0] = asc_sample(samples, first, n);
        pair[1] = asc_sample(samples, first, n + 1);
    }
}

/* Read a frame into z in bit-reversed order, and take the first step of the transform: sums and differences of pairs. */
static void asc_load(const int16_t *samples, int first, float *z)
{
    int place = 0;
    for (int n = 0; n < POINTS; n += 2) {
        float even[2], odd[2], *pair = z + 2 * place;
        asc_pair(samples, first, n, even);
        asc_pair(samples, first, n + POINTS, odd);
        pair[0] = even[0] + odd[0];
        pair[1] = even[1] + odd[1];
        pair[2] = even[0] - odd[0];
        pair[3] = even[1] - odd[1];
        int bit = POINTS / 2;
        for (; place & bit; bit >>= 1)
            place ^= bit;
        place |= bit;
    }
}

/* Join transforms of `length` points in twos. */
static void asc_join2(float *z, int length)
{
    for (int j = 0; j < length; j++) {
        int angle = j * (QUARTER / length) * 2; /* of half a turn */
        float wr = angle <= QUARTER ? asc_sine[QUARTER - angle] : -asc_sine[angle - QUARTER];
        float wi = angle <= QUARTER ? -asc_sine[angle] : -asc_sine[2 * QUARTER - angle];
        for (float *a = z + 2 * j; a < z + 2 * POINTS; a += 4 * length) {
            float *b = a + 2 * length;
            float re = b[0] * wr - b[1] * wi, im = b[0] * wi + b[1] * wr;
            b[0] = a[0] - re;
            b[1] = a[1] - im;
            a[0] += re;
            a[1] += im;
        }
    }
}

/* Join transforms of `length` points in fours. */
static void asc_join4(float *z, int length)
{
    for (int j = 0; j < length; j++) {
        int angle = j * (QUARTER / length); /* of a quarter of a turn */
        float wr = asc_sine[QUARTER - angle], wi = -asc_sine[angle];
        float vr = wr * wr - wi * wi, vi = 2.0f * wr * wi;
        float ur = wr * vr - wi * vi, ui = wr * vi + wi * vr;
        for (float *a = z + 2 * j; a < z + 2 * POINTS; a += 8 * length) {
            float *b = a + 2 * length, *c = b + 2 * length, *d = c + 2 * length;
            float br = b[0] * vr - b[1] * vi, bi = b[0] * vi + b[1] * vr;
            float cr = c[0] * wr - c[1] * wi, ci = c[0] * wi + c[1] * wr;
            float dr = d[0] * ur - d[1] * ui, di = d[0] * ui + d[1] * ur;
            float sr = a[0] + br, si = a[1] + bi, tr = a[0] - br, ti = a[1] - bi;
            float pr = cr + dr, pi = ci + di, qr = cr - dr, qi = ci - di;
            a[0] = sr + pr;
            a[1] = si + pi;
            b[0] = tr + qi;
            b[1] = ti - qr;
            c[0] = sr - pr;
            c[1] = si - pi;
            d[0] = tr - qi;
            d[1] = ti + qr;
        }
    }
}

/* Replace the transform of even and odd samples by four times the power of the whole; that of bin k is z[2 k]. */
static void asc_power(float *z)
{
    z[0] = 4.0f * (z[0] + z[1]) * (z[0] + z[1]);
    for (int k = 1; k < POINTS / 2; k++) {
        float *low = z + 2 * k, *high = z + 2 * (POINTS - k);
        float er = low[0] + high[0], ei = low[1] - high[1], dr = low[1] + high[1], di = high[0] - low[0];
        float wr = asc_sine[QUARTER - k], wi = -asc_sine[k];
        float pr = dr * wr - di * wi, pi = dr * wi + di * wr;
        low[0] = (er + pr) * (er + pr) + (ei + pi) * (ei + pi);
        high[0] = (er - pr) * (er - pr) + (ei - pi) * (ei - pi);
    }
    z[POINTS] = 4.0f * (z[POINTS] * z[POINTS] + z[POINTS + 1] * z[POINTS + 1]);
}

/* The natural logarithm of a normal number, to two units in the last place: libm's may compute in double, which a core
 * without double registers does in software. log m = 2 artanh((m - 1) / (m + 1)), m in [0.7, 1.4]. */
static float asc_log(float x)
{
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    int32_t exponent = (bits - 0x3F3504F3) >> 23;
    bits -= exponent * (1 << 23);
    memcpy(&x, &bits, sizeof x);
    float s = (x - 1.0f) / (x + 1.0f), square = s * s;
    float series = 2.0f + square * (0.666666667f + square * (0.4f + square * (0.285714286f + square * 0.222222222f)));
    return (float)exponent * 0.693147181f + s * series;
}

/* Write the 8-bit log-mels of a frame. Bin k lies on the rising side of a mel bin and on the falling side of the one
 * before, with weights that add up to 1. */
static void asc_frame(const float *z, uint8_t *mel)
{
    float before = 0.0f;
    for (int m = 0; m <= ASC_MELS; m++) {
        float all = 0.0f, rising = 0.0f;
        for (int k = asc_edges[m]; k < asc_edges[m + 1]; k++) {
            all += z[2 * k];
            rising += z[2 * k] * asc_rise[k - asc_edges[0]];
        }
        if (m > 0) {
            float energy = (before + (all - rising)) * (1.0f / 4294967296.0f); /* full scale is 2^15 */
            float value = (asc_log(energy + 1e-5f) + 4.5f) / 5.0f;
            mel[(m - 1) * ASC_FRAMES] = asc_rounded(value / ASC_MEL_STEP, ASC_MEL_ZERO, 0);
        }
        before = rising;
    }
}

void asc_log_mel(const int16_t *samples, uint8_t *mel, float *work)
{
    for (int frame = 0; frame < ASC_FRAMES; frame++) {
        int length = 2;
        asc_load(samples, frame * ASC_HOP - ASC_LEFT, work);
        for (; length < POINTS / 2; length *= 4)
            asc_join4(work, length);
        if (length < POINTS)
            asc_join2(work, length);
        asc_power(work);
        asc_frame(work, mel + frame);
    }
}
