/* Loads every program of a file, runs it on random samples, and prints what came out: `error` or `crc of the arena`.
 *
 * Every block of memory is exactly as large as the engine asked for, so that a sanitizer sees one element too many.
 * The file: for each program its size (uint32, little-endian), then its bytes.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "mote.h"
#include "mote_internal.h"

static uint32_t state = 1;

static uint32_t next_random(void)
{
    state ^= state << 13;
    state ^= state >> 17;
    state ^= state << 5;
    return state;
}

static float next_float(void)
{
    return (float)(next_random() >> 8) * (2.0f / 16777216.0f) - 1.0f;
}

static void *block(size_t size)
{
    void *p = malloc(size ? size : 1);
    if (p == NULL) {
        exit(2);
    }
    return p;
}

static int is_float(const mote_t *m)
{
    return mote_input_type(m) == MOTE_FLOAT32;
}

/* A random sample: x is mote_inputs floats, or as many int8. */
static void draw(const mote_t *m, void *x, float *target)
{
    for (size_t i = 0; i < mote_inputs(m); i++) {
        if (is_float(m)) {
            ((float *)x)[i] = next_float();
        } else {
            ((int8_t *)x)[i] = (int8_t)(next_random() >> 24);
        }
    }
    for (size_t i = 0; i < mote_targets(m); i++) {
        target[i] = mote_header(m)->loss == MOTE_CROSS_ENTROPY ? (float)(next_random() % mote_outputs(m))
                                                               : next_float() * 0.5f + 0.5f;
    }
}

/* One step, in one of the ways that the engine has. */
static int learn(mote_t *m, const void *x, const float *target, int step)
{
    int has_momentum = (mote_header(m)->flags & MOTE_HAS_MOMENTUM) != 0;
    mote_sgd_t how = {0.05f, has_momentum ? 0.5f : 0.0f, step % 2 ? 0.01f : 0.0f, step % 3 ? 0.5f : 0.0f};
    float loss;
    const int error = mote_learn_with(m, x, target, &how, &loss);
    if (mote_header(m)->loss == MOTE_NO_LOSS || mote_header(m)->flags & MOTE_TRAINS_INT8) {
        return error == MOTE_ERR_FROZEN ? MOTE_OK : error == MOTE_ERR_DIVERGED ? error : MOTE_ERR_ARGUMENT;
    }
    return error;
}

static int run(const void *program, size_t size, int steps)
{
    size_t need = mote_arena_bytes(program, size), count;
    if (need > ((size_t)1 << 24)) {
        return MOTE_ERR_ARENA;
    }
    uint8_t *arena = block(need);
    const void *out;
    float loss;
    mote_t m;
    int error = mote_load(&m, program, size, arena, need);
    if (error == MOTE_OK) {
        int learns = mote_header(&m)->loss != MOTE_NO_LOSS;
        void *x = block(mote_inputs(&m) * (is_float(&m) ? sizeof(float) : 1));
        float *parameters = mote_parameters(&m, &count);
        for (size_t i = 0; i < count; i++) {
            parameters[i] = next_float();
        }
        memset(mote_activations(&m), 0, mote_header(&m)->activations);
        for (int step = 0; step < steps && error == MOTE_OK; step++) {
            if (step == steps / 2) {
                (void)mote_grow(&m);
            }
            float *target = block(mote_targets(&m) * sizeof *target);
            draw(&m, x, target);
            uint32_t layers = step % 3 ? m.trainable : m.trainable & next_random();
            uint32_t mask = step % 3 ? m.trainable : m.trainable & next_random();
            error = mote_train_mask(&m, mask, step % 4 ? 0 : next_random());
            const int inferred = mote_infer(&m, x, &out);
            if (error != MOTE_OK || (inferred != MOTE_OK && inferred != MOTE_ERR_DIVERGED)) {
                abort();
            }
            if (learns) {
                error = mote_learn(&m, x, target, 0.05f, &loss);
            }
            if (error == MOTE_OK) {
                error = learn(&m, x, target, step);
            }
            free(target);
        }
        if (error != MOTE_OK && error != MOTE_ERR_DIVERGED) {
            abort();
        }
        printf("%d %08x\n", error, mote_crc32(0, arena, need));
        free(x);
    }
    free(arena);
    return error;
}

int main(int argc, char **argv)
{
    FILE *file = argc == 3 ? fopen(argv[1], "rb") : NULL;
    uint32_t size;
    if (file == NULL) {
        return 2;
    }
    while (fread(&size, sizeof size, 1, file) == 1) {
        void *program = block(size);
        if (fread(program, 1, size, file) != size) {
            return 2;
        }
        int error = run(program, size, atoi(argv[2]));
        if (error != MOTE_OK && error != MOTE_ERR_DIVERGED) {
            printf("%d\n", error);
        }
        free(program);
    }
    fclose(file);
    return 0;
}
