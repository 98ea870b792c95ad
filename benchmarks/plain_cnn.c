/* The yardstick: 12x12 pixels, 8 filters of 3x3, ReLU, 2x2 max pooling, 10 classes, and its training step as one writes
 * them by hand, loops over arrays. */
#include <math.h>

#include "bench.h"

enum { SIDE = 12, KERNEL = 3, FILTERS = 8, CONV = SIDE - KERNEL + 1, POOL = CONV / 2, OUTPUTS = 10 };
enum { FLAT = POOL * POOL * FILTERS };

static float w1[FILTERS][KERNEL][KERNEL], b1[FILTERS], w2[OUTPUTS][FLAT], b2[OUTPUTS];
static float x[SIDE][SIDE], c[CONV][CONV][FILTERS], h[FLAT], dh[FLAT], p[OUTPUTS];
static uint8_t largest[FLAT]; /* which of the four elements of a window */
static int target;

int bench_start(void)
{
    uint32_t state = 1;
    for (int f = 0; f < FILTERS; f++) {
        for (int i = 0; i < KERNEL * KERNEL; i++) {
            w1[f][i / KERNEL][i % KERNEL] = 0.3f * bench_noise(&state);
        }
    }
    for (int i = 0; i < OUTPUTS; i++) {
        for (int j = 0; j < FLAT; j++) {
            w2[i][j] = 0.15f * bench_noise(&state);
        }
    }
    return 1;
}

void bench_sample(uint32_t step)
{
    static uint32_t noise = 12345u;
    target = (int)(step % OUTPUTS);
    uint32_t state = 99991u * ((uint32_t)target + 1u);
    for (int i = 0; i < SIDE * SIDE; i++) {
        x[i / SIDE][i % SIDE] = bench_element(&state, &noise);
    }
}

static void convolve(void)
{
    for (int i = 0; i < CONV; i++) {
        for (int j = 0; j < CONV; j++) {
            for (int f = 0; f < FILTERS; f++) {
                float sum = b1[f];
                for (int k = 0; k < KERNEL; k++) {
                    for (int l = 0; l < KERNEL; l++) {
                        sum += w1[f][k][l] * x[i + k][j + l];
                    }
                }
                c[i][j][f] = sum > 0.0f ? sum : 0.0f;
            }
        }
    }
}

static void pool(void)
{
    for (int i = 0; i < POOL; i++) {
        for (int j = 0; j < POOL; j++) {
            for (int f = 0; f < FILTERS; f++) {
                const int at = (i * POOL + j) * FILTERS + f;
                h[at] = c[2 * i][2 * j][f];
                largest[at] = 0;
                for (int k = 1; k < 4; k++) {
                    const float v = c[2 * i + k / 2][2 * j + k % 2][f];
                    if (v > h[at]) {
                        h[at] = v;
                        largest[at] = (uint8_t)k;
                    }
                }
            }
        }
    }
}

int bench_infer(void)
{
    float top = -INFINITY, sum = 0.0f;
    convolve();
    pool();
    for (int i = 0; i < OUTPUTS; i++) {
        p[i] = b2[i];
        for (int j = 0; j < FLAT; j++) {
            p[i] += w2[i][j] * h[j];
        }
        top = p[i] > top ? p[i] : top;
    }
    for (int i = 0; i < OUTPUTS; i++) {
        p[i] = expf(p[i] - top);
        sum += p[i];
    }
    for (int i = 0; i < OUTPUTS; i++) {
        p[i] /= sum;
    }
    return 0;
}

int bench_learn(void)
{
    const float rate = 0.02f;
    (void)bench_infer();
    const float loss = -logf(p[target]);
    for (int j = 0; j < FLAT; j++) {
        dh[j] = 0.0f;
    }
    for (int i = 0; i < OUTPUTS; i++) {
        const float d = p[i] - (i == target ? 1.0f : 0.0f);
        for (int j = 0; j < FLAT; j++) {
            dh[j] += d * w2[i][j];
            w2[i][j] -= rate * d * h[j];
        }
        b2[i] -= rate * d;
    }
    for (int at = 0; at < FLAT; at++) {
        if (h[at] > 0.0f) { /* the gradient goes to the window's largest element alone */
            const int f = at % FILTERS, i = at / FILTERS / POOL * 2, j = at / FILTERS % POOL * 2;
            for (int k = 0; k < KERNEL; k++) {
                for (int l = 0; l < KERNEL; l++) {
                    w1[f][k][l] -= rate * dh[at] * x[i + largest[at] / 2 + k][j + largest[at] % 2 + l];
                }
            }
            b1[f] -= rate * dh[at];
        }
    }
    return loss >= 0.0f ? 0 : -1;
}
