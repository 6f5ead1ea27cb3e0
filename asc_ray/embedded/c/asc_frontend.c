/* The log-mel front end, in float32.
 *
 * x[t] - 0.97 x[t-1]  ->  centred Fourier transform, power  ->  Kaldi mel bank  ->  log(mel + 1e-5)  ->  (x + 4.5) / 5
 *
 * It computes what asc_ray.runtime.frontend computes in NumPy, with sums in another order. Two frames go through one
 * complex transform, as its real and its imaginary part.
 *
 * The transform is by decimation in time, radix 8. Columns of ASC_ROWS points come first, because they need no twiddles
 * and know which samples are zero; passes that join eight transforms follow.
 */
#define ASC_FRONTEND_TABLES
#include "asc_frontend.h"

#include <math.h>

#include "asc_kernels.h"

#if defined(__ARM_FEATURE_DSP)
#include <arm_acle.h>
#endif

#define LENGTH (ASC_SAMPLES - 1) /* pre-emphasis takes one sample */
#define COLUMNS (ASC_N_FFT / ASC_ROWS)

/* Whether point n of eight in a column is not zero. */
#define UNDER_WINDOW(n) ((n) * ASC_ROWS < 8 * ASC_FILLED)

#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline)) /* so that distances and what is zero are constants */
#else
#define INLINE static inline
#endif

/* Return a + b * c, rounded once: computers give the same bits whether or not they have an instruction for it. Software
 * takes long for that, so a core without an FPU rounds twice. */
INLINE float asc_fused(float a, float b, float c)
{
#if defined(__arm__) && !defined(__ARM_FEATURE_FMA)
    return a + b * c;
#else
    return fmaf(b, c, a);
#endif
}

/* Both parts come in one load, which takes a Cortex-M4 less than two. */
INLINE asc_complex asc_load(const asc_complex *at)
{
    asc_complex both, z;
    both.both = at->both;
    z.part[0] = both.part[0];
    z.part[1] = both.part[1];
    return z;
}

INLINE void asc_store(asc_complex *at, asc_complex z)
{
    at->part[0] = z.part[0];
    at->part[1] = z.part[1];
}

/* 100 times the sample behind pre-emphasis. */
INLINE int32_t asc_emphasized(const int16_t *x)
{
#if defined(__ARM_FEATURE_DSP)
    uint32_t pair;
    memcpy(&pair, x, sizeof pair);
    return __smuad((int16x2_t)pair, (int16x2_t)0x0064FF9F); /* 100 and -97 */
#else
    return 100 * x[1] - 97 * x[0];
#endif
}

/* The same for sample n of a clip whose edges reflect. */
INLINE int32_t asc_reflected(const int16_t *samples, int n)
{
    n = n < 0 ? -n : n;
    return asc_emphasized(samples + (n < LENGTH ? n : 2 * (LENGTH - 1) - n));
}

/* Return a sample of two frames under the window; the first frame begins at sample `first` of the clip, and is `inside`
 * of it, or not. */
INLINE asc_complex asc_read(const int16_t *samples, int first, int inside, int column, int row)
{
    asc_complex z = {{0.0f, 0.0f}};
    if (row < ASC_FILLED) {
        int n = first + column + row * COLUMNS, next = n + ASC_HOP;
        float window = asc_window[column * ASC_FILLED + row];
        z.part[0] = (float)(inside ? asc_emphasized(samples + n) : asc_reflected(samples, n)) * window;
        z.part[1] = (float)(inside ? asc_emphasized(samples + next) : asc_reflected(samples, next)) * window;
    }
    return z;
}

/* Return b times the twiddle w; without one that is 1. */
INLINE asc_complex asc_turned(const asc_complex *b, const asc_complex *w)
{
    asc_complex c = *b;
    if (w) {
        c.part[0] = asc_fused(b->part[0] * w->part[0], -b->part[1], w->part[1]);
        c.part[1] = asc_fused(b->part[1] * w->part[0], b->part[0], w->part[1]);
    }
    return c;
}

/* Replace a and b by a + w b and a - w b. */
INLINE void asc_join(asc_complex *a, asc_complex *b, const asc_complex *w)
{
    asc_complex c = asc_turned(b, w);
    b->part[0] = a->part[0] - c.part[0];
    b->part[1] = a->part[1] - c.part[1];
    a->part[0] += c.part[0];
    a->part[1] += c.part[1];
}

/* Replace a and b by a - i w b and a + i w b. */
INLINE void asc_join_quarter(asc_complex *a, asc_complex *b, const asc_complex *w)
{
    asc_complex c = asc_turned(b, w);
    b->part[0] = a->part[0] - c.part[1];
    b->part[1] = a->part[1] + c.part[0];
    a->part[0] += c.part[1];
    a->part[1] -= c.part[0];
}

/* Join eight transforms, of which z is one bin each, with the twiddles w[0..3]; without them transform the points z, of
 * which there are `rows`: all, each second one or each fourth one. Results come in the order z[0, 4, 2, 6, 1, 5, 3, 7]. */
INLINE void asc_join8(asc_complex z[8], int rows, const asc_complex *w)
{
    const asc_complex eighth = {{0.707106781f, -0.707106781f}};
    const asc_complex *half = w ? w + 1 : 0, *whole = w ? w + 2 : 0, *more = w ? w + 3 : &eighth;
    asc_join(&z[0], &z[4], w);
    if (rows > 2) {
        if (w || UNDER_WINDOW(6))
            asc_join(&z[2], &z[6], w);
        else
            z[6] = z[2];
        asc_join(&z[0], &z[2], half);
        asc_join_quarter(&z[4], &z[6], half);
    }
    if (rows > 4) {
        asc_join(&z[1], &z[5], w);
        if (w || UNDER_WINDOW(7))
            asc_join(&z[3], &z[7], w);
        else
            z[7] = z[3];
        asc_join(&z[1], &z[3], half);
        asc_join_quarter(&z[5], &z[7], half);
        asc_join(&z[0], &z[1], whole);
        asc_join_quarter(&z[2], &z[3], whole);
        asc_join(&z[4], &z[5], more);
        asc_join_quarter(&z[6], &z[7], more);
    }
}

/* Read two frames, and transform their columns. The column that comes next is the one whose number has the digits of
 * the place, to the base 8, in reverse. */
static void asc_columns(const int16_t *samples, int first, int inside, asc_complex *work)
{
    for (int high = 0; high < COLUMNS / 8; high++) {
        int place = 0;
        for (int digit = 1; digit < COLUMNS / 8; digit *= 8)
            place = 8 * place + high / digit % 8;
        asc_complex *out = work + ASC_ROWS * place;
        for (int column = 8 * high; column < 8 * high + 8; column++, out += ASC_N_FFT / 8) {
            asc_complex z[8];
            z[0] = asc_read(samples, first, inside, column, 0);
            z[4] = asc_read(samples, first, inside, column, ASC_ROWS / 2);
            if (ASC_ROWS > 2) {
                z[2] = asc_read(samples, first, inside, column, ASC_ROWS / 4);
                z[6] = asc_read(samples, first, inside, column, ASC_ROWS * 3 / 4);
            }
            if (ASC_ROWS > 4) {
                z[1] = asc_read(samples, first, inside, column, 1);
                z[3] = asc_read(samples, first, inside, column, 3);
                z[5] = asc_read(samples, first, inside, column, 5);
                z[7] = asc_read(samples, first, inside, column, 7);
            }
            asc_join8(z, ASC_ROWS, 0);
            asc_store(out, z[0]);
            asc_store(out + 1, z[4]);
            if (ASC_ROWS > 2) {
                asc_store(out + 2, z[2]);
                asc_store(out + 3, z[6]);
            }
            if (ASC_ROWS > 4) {
                asc_store(out + 4, z[1]);
                asc_store(out + 5, z[5]);
                asc_store(out + 6, z[3]);
                asc_store(out + 7, z[7]);
            }
        }
    }
}

/* Join transforms of `length` points in eights. */
INLINE void asc_eights(asc_complex *work, int length)
{
    const asc_complex *twiddle = asc_twiddles;
    for (int j = 0; j < length; j++, twiddle += 3 * (ASC_N_FFT / 8 / length)) {
        asc_complex w[4], *at = work + j;
        w[1] = asc_load(twiddle);
        w[2] = asc_load(twiddle + 1);
        w[3] = asc_load(twiddle + 2);
        w[0].part[0] = asc_fused(-1.0f, w[1].part[0], w[1].part[0] + w[1].part[0]); /* w[1] * w[1] */
        w[0].part[1] = w[1].part[0] * (w[1].part[1] + w[1].part[1]);
        for (int n = 0; n < ASC_N_FFT / 8 / length; n++, at += 8 * length) {
            asc_complex z[8];
            z[0] = asc_load(at);
            z[1] = asc_load(at + length);
            z[2] = asc_load(at + 2 * length);
            z[3] = asc_load(at + 3 * length);
            z[4] = asc_load(at + 4 * length);
            z[5] = asc_load(at + 5 * length);
            z[6] = asc_load(at + 6 * length);
            z[7] = asc_load(at + 7 * length);
            asc_join8(z, 8, w);
            asc_store(at, z[0]);
            asc_store(at + length, z[4]);
            asc_store(at + 2 * length, z[2]);
            asc_store(at + 3 * length, z[6]);
            asc_store(at + 4 * length, z[1]);
            asc_store(at + 5 * length, z[5]);
            asc_store(at + 6 * length, z[3]);
            asc_store(at + 7 * length, z[7]);
        }
    }
}

/* Return the 8-bit log-mel: how many of the energies at which it grows by one are reached. The bits of a float are less
 * than its logarithm to the base 2, and by less than 0.09, so the count begins just below. */
INLINE uint8_t asc_log(float energy)
{
    int32_t bits, n;
    energy += 1e-5f;
    memcpy(&bits, &energy, sizeof bits);
    n = (int32_t)asc_fused(ASC_LOG_SHIFT, (float)bits, ASC_LOG_SLOPE);
    n = n < 0 ? 0 : n > 255 ? 255 : n;
    while (bits >= asc_growth[n])
        n++;
    return (uint8_t)n;
}

/* Write the 8-bit log-mels of two frames: sum and difference of bin k and the conjugate of bin -k are their spectra.
 * Bin k lies on the rising side of a mel bin and on the falling side of the one before, with weights that add up to 1. */
static void asc_mel_bins(const asc_complex *work, uint8_t *mel)
{
    const float *rise = asc_rise;
    float before = 0.0f, next_before = 0.0f;
    for (int m = 0; m <= ASC_MELS; m++) {
        float all = 0.0f, rising = 0.0f, next_all = 0.0f, next_rising = 0.0f;
        const asc_complex *up = work + asc_edges[m], *down = work + ASC_N_FFT - asc_edges[m];
        for (; up < work + asc_edges[m + 1]; up++, down--, rise++) {
            asc_complex x = asc_load(up), y = asc_load(down);
            float a = x.part[0] + y.part[0], b = x.part[1] - y.part[1];
            float c = x.part[1] + y.part[1], d = x.part[0] - y.part[0];
            float power = asc_fused(a * a, b, b), next_power = asc_fused(c * c, d, d);
            all += power;
            rising = asc_fused(rising, power, *rise);
            next_all += next_power;
            next_rising = asc_fused(next_rising, next_power, *rise);
        }
        if (m > 0) {
            mel[(m - 1) * ASC_FRAMES] = asc_log(before + (all - rising));
            mel[(m - 1) * ASC_FRAMES + 1] = asc_log(next_before + (next_all - next_rising));
        }
        before = rising;
        next_before = next_rising;
    }
}

void asc_log_mel(const int16_t *samples, uint8_t *mel, asc_complex *work)
{
    for (int n = 0; n < ASC_FRAMES; n += 2) {
        int frame = n + 1 < ASC_FRAMES ? n : n - 1; /* the last one of an odd number goes with the one before, again */
        int first = frame * ASC_HOP - ASC_LEFT;
        if (first >= 0 && first + ASC_HOP + ASC_FILLED * COLUMNS <= LENGTH)
            asc_columns(samples, first, 1, work);
        else
            asc_columns(samples, first, 0, work);
        asc_eights(work, ASC_ROWS);
        if (ASC_N_FFT > 8 * ASC_ROWS)
            asc_eights(work, 8 * ASC_ROWS);
        if (ASC_N_FFT > 64 * ASC_ROWS)
            asc_eights(work, 64 * ASC_ROWS);
        if (ASC_N_FFT > 512 * ASC_ROWS)
            asc_eights(work, 512 * ASC_ROWS);
        asc_mel_bins(work, mel + frame);
    }
}
