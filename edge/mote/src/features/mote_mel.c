/* Log-mel features of speech in fixed point; mote_mel.h says which.
 *
 * A real FFT of 512 samples as a complex one of 256 (Sorensen et al. 1987, "Real-valued fast Fourier transform
 * algorithms"), radix 2, decimation in time. Nothing needs to be scaled on the way: a windowed sample has at most 18
 * bits with its sign, their sum over a frame 26, twice that with both halves of the real spectrum.
 */
#include "mote_mel.h"

#include <string.h>

#include "mote_mel_tables.h"

enum {
    HALF = MOTE_MEL_WINDOW / 2,
    QUARTER = MOTE_MEL_WINDOW / 4,
    FLOOR = 26 * 8, /* the logarithm that is 0: noise of the last bit or two of a sample */
};

/* cos(2 pi k / 512) for k up to 256, in 1/32767. */
static int32_t cosine(uint32_t k)
{
    return mel_sine[k + QUARTER];
}

/* value * factor / 32768, rounded. */
static int32_t times(int32_t value, int32_t factor)
{
    return (int32_t)(((int64_t)value * factor + (1 << 14)) >> 15);
}

/* The windowed samples, taken in pairs as complex numbers, in the order of their reversed bits. */
static void window(const int16_t *samples, int32_t *z)
{
    for (uint32_t n = 0; n < HALF; n++) {
        uint32_t at = n;
        at = (at & 0x55u) << 1 | (at >> 1 & 0x55u);
        at = (at & 0x33u) << 2 | (at >> 2 & 0x33u);
        at = (at & 0x0fu) << 4 | at >> 4;
        for (uint32_t i = 0; i < 2; i++) {
            uint32_t k = 2 * n + i;
            int32_t w = 32768 - cosine(k <= HALF ? k : MOTE_MEL_WINDOW - k); /* in 1/65536 */
            z[2 * at + i] = (int32_t)(((int64_t)samples[k] * w + (1 << 13)) >> 14);
        }
    }
}

static void fft(int32_t *z)
{
    for (uint32_t half = 1; half < HALF; half *= 2) {
        uint32_t step = HALF / half; /* of the table, of 512 to the turn */
        for (uint32_t k = 0; k < half; k++) {
            int32_t c = cosine(k * step), s = mel_sine[k * step];
            for (uint32_t i = k; i < HALF; i += 2 * half) {
                int32_t *a = z + 2 * i, *b = z + 2 * (i + half);
                int32_t re = (int32_t)(((int64_t)b[0] * c + (int64_t)b[1] * s + (1 << 14)) >> 15);
                int32_t im = (int32_t)(((int64_t)b[1] * c - (int64_t)b[0] * s + (1 << 14)) >> 15);
                b[0] = a[0] - re;
                b[1] = a[1] - im;
                a[0] += re;
                a[1] += im;
            }
        }
    }
}

/* The power of bin k, 1 .. 255, times 4. */
static uint64_t power(const int32_t *z, uint32_t k)
{
    const int32_t *a = z + 2 * k, *b = z + 2 * (HALF - k);
    int32_t even_re = a[0] + b[0], even_im = a[1] - b[1];
    int32_t odd_re = a[1] + b[1], odd_im = b[0] - a[0];
    int32_t c = cosine(k), s = mel_sine[k];
    int64_t re = even_re + times(odd_re, c) + times(odd_im, s);
    int64_t im = even_im + times(odd_im, c) - times(odd_re, s);
    return (uint64_t)(re * re) + (uint64_t)(im * im);
}

/* The logarithm in eighths of an octave, less FLOOR, as a byte. */
static uint8_t logarithm(uint64_t energy)
{
    uint32_t octave = 63, eighth = 0;
    if (energy >> (FLOOR / 8) == 0) {
        return 0;
    }
    while (energy >> 63 == 0) {
        energy <<= 1;
        octave--;
    }
    uint32_t mantissa = (uint32_t)(energy >> 32);
    while (eighth < 7 && mantissa >= mel_octave[eighth]) {
        eighth++;
    }
    uint32_t value = octave * 8 + eighth - FLOOR;
    return (uint8_t)(value > 255 ? 255 : value);
}

static void frame(mote_mel_t *m, uint8_t *bands)
{
    uint64_t rising = 0, falling = 0; /* into the band that ends next, and into the one behind it */
    uint32_t band = 0;
    window(m->samples, m->buffer);
    fft(m->buffer);
    for (uint32_t k = 1; k < HALF; k++) {
        if (mel_band[k] > MOTE_MEL_BANDS) {
            continue;
        }
        for (; band < mel_band[k]; band++) {
            if (band > 0) {
                bands[band - 1] = logarithm(falling);
            }
            falling = rising;
            rising = 0;
        }
        uint64_t p = power(m->buffer, k);
        rising += p * mel_weight[k];
        falling += p * (255u - mel_weight[k]);
    }
    bands[MOTE_MEL_BANDS - 1] = logarithm(falling);
}

void mote_mel_open(mote_mel_t *m)
{
    m->filled = 0;
}

size_t mote_mel_push(mote_mel_t *m, const int16_t *samples, size_t count, uint8_t *bands)
{
    size_t frames = 0;
    while (count > 0) {
        size_t taken = MOTE_MEL_WINDOW - m->filled;
        taken = taken < count ? taken : count;
        memcpy(m->samples + m->filled, samples, taken * sizeof *samples);
        m->filled += (uint32_t)taken;
        samples += taken;
        count -= taken;
        if (m->filled == MOTE_MEL_WINDOW) {
            frame(m, bands + frames * MOTE_MEL_BANDS);
            frames++;
            m->filled = MOTE_MEL_WINDOW - MOTE_MEL_HOP;
            memmove(m->samples, m->samples + MOTE_MEL_HOP, m->filled * sizeof *m->samples);
        }
    }
    return frames;
}

void mote_mel_level(uint8_t *bands, size_t count)
{
    uint32_t sum = 0;
    for (size_t i = 0; i < count; i++) {
        sum += bands[i];
    }
    uint32_t mean = count > 0 ? sum / (uint32_t)count : 0;
    for (size_t i = 0; i < count; i++) {
        bands[i] = (uint8_t)(bands[i] > mean ? bands[i] - mean : 0);
    }
}
