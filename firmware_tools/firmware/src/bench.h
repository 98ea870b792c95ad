/* What main_bench.c measures: something that infers and learns. bench_mote.c is the engine. */
#ifndef BENCH_H
#define BENCH_H

#include <stdint.h>

/* Ready to run. Returns 1 if it learns, 0 if it only infers; negative on an error. */
int bench_start(void);

/* Makes ready a sample of class `step`, modulo the classes. Not measured. */
void bench_sample(uint32_t step);

/* On the sample that was made: 0, or an error. */
int bench_infer(void);
int bench_learn(void);

/* Uniform in [-1, 1): xorshift32 (Marsaglia, 2003). */
static inline float bench_noise(uint32_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 17;
    *state ^= *state << 5;
    return (float)(int32_t)*state * (1.0f / 2147483648.0f);
}

/* Element i, in order, of a sample around its class's own. */
static inline float bench_element(uint32_t *of_class, uint32_t *of_sample)
{
    return bench_noise(of_class) + 0.5f * bench_noise(of_sample);
}

#endif
