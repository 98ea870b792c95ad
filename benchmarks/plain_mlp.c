/* The yardstick: a 64-32-10 perceptron and its training step as one writes them by hand, loops over arrays. */
#include <math.h>

#include "bench.h"

enum { INPUTS = 64, HIDDEN = 32, OUTPUTS = 10 };

static float w1[HIDDEN][INPUTS], b1[HIDDEN], w2[OUTPUTS][HIDDEN], b2[OUTPUTS];
static float x[INPUTS], h[HIDDEN], p[OUTPUTS], dh[HIDDEN];
static int target;

int bench_start(void)
{
    uint32_t state = 1;
    for (int i = 0; i < HIDDEN; i++) {
        for (int j = 0; j < INPUTS; j++) {
            w1[i][j] = 0.2f * bench_noise(&state);
        }
    }
    for (int i = 0; i < OUTPUTS; i++) {
        for (int j = 0; j < HIDDEN; j++) {
            w2[i][j] = 0.3f * bench_noise(&state);
        }
    }
    return 1;
}

void bench_sample(uint32_t step)
{
    static uint32_t noise = 12345u;
    target = (int)(step % OUTPUTS);
    uint32_t state = 99991u * ((uint32_t)target + 1u);
    for (int i = 0; i < INPUTS; i++) {
        x[i] = bench_element(&state, &noise);
    }
}

int bench_infer(void)
{
    for (int i = 0; i < HIDDEN; i++) {
        float sum = b1[i];
        for (int j = 0; j < INPUTS; j++) {
            sum += w1[i][j] * x[j];
        }
        h[i] = sum > 0.0f ? sum : 0.0f;
    }
    float top = -INFINITY, sum = 0.0f;
    for (int i = 0; i < OUTPUTS; i++) {
        p[i] = b2[i];
        for (int j = 0; j < HIDDEN; j++) {
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
    for (int j = 0; j < HIDDEN; j++) {
        dh[j] = 0.0f;
    }
    for (int i = 0; i < OUTPUTS; i++) {
        const float d = p[i] - (i == target ? 1.0f : 0.0f);
        for (int j = 0; j < HIDDEN; j++) {
            dh[j] += d * w2[i][j];
            w2[i][j] -= rate * d * h[j];
        }
        b2[i] -= rate * d;
    }
    for (int i = 0; i < HIDDEN; i++) {
        if (h[i] > 0.0f) {
            for (int j = 0; j < INPUTS; j++) {
                w1[i][j] -= rate * dh[i] * x[j];
            }
            b1[i] -= rate * dh[i];
        }
    }
    return loss >= 0.0f ? 0 : -1;
}
