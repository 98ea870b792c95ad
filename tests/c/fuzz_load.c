/* Loads whatever the fuzzer makes up as a program, and runs what loads, under AddressSanitizer and UBSan.
 *
 * Length and checksum are set right here, so that the fuzzer gets behind them, unless the magic ends in a small letter.
 * Every block of memory is exactly as large as the engine asked for. */
#include <stdlib.h>
#include <string.h>

#include "mote_internal.h"

/* A program of more work than this is loaded, and not run: a fuzzer wants many short runs. */
enum { MOST_WORK = 300000, MOST_MEMORY = 1 << 20 };

static uint32_t state;

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

/* About so many multiplications, or more. */
static uint64_t work(const mote_t *m)
{
    uint64_t sum = 0;
    for (uint32_t i = 0; i < mote_header(m)->ops; i++) {
        const mote_op_t *op = &mote_ops(m)[i];
        const uint64_t in = mote_size(mote_tensor(m, op->in)), out = mote_size(mote_tensor(m, op->out));
        const uint64_t window = (uint64_t)op->kernel_h * op->kernel_w;
        const int dense = op->kind == MOTE_DENSE || op->kind == MOTE_INT8_DENSE || op->kind == MOTE_TRAINED_INT8_DENSE;
        sum += in + out + (dense ? in * out : out * window * mote_tensor(m, op->in)->c);
        if (sum > MOST_WORK) {
            break;
        }
    }
    return sum;
}

static void expect(int holds)
{
    if (!holds) {
        abort();
    }
}

/* A result that does not come of a wrong call: the samples are right, the weights may be anything. */
static int is_harmless(int error)
{
    return error == MOTE_OK || error == MOTE_ERR_DIVERGED;
}

/* A target that fits, in a block of its own: how large it is changes as the model grows. */
static float *make_target(const mote_t *m)
{
    float *target = malloc(mote_targets(m) * sizeof *target);
    for (size_t i = 0; i < mote_targets(m); i++) {
        target[i] = mote_header(m)->loss == MOTE_CROSS_ENTROPY ? (float)(next_random() % mote_outputs(m))
                                                               : (next_float() + 1.0f) / 2.0f;
    }
    return target;
}

static void teach(mote_t *m, const void *x)
{
    float loss, *target = make_target(m);
    const void *y;
    const mote_sgd_t plain = {0.05f, 0.0f, 0.001f, 1.0f}, heavy = {0.05f, 0.9f, 0.0f, 0.0f};
    size_t count = 0, first = 0;
    const int frozen = mote_header(m)->loss == MOTE_NO_LOSS;
    expect(frozen || is_harmless(mote_loss(m, x, target, &loss, &y)));
    for (uint32_t turn = 0; turn < 3; turn++) {
        const uint32_t layers = m->trainable & (turn ? next_random() : ~0u);
        expect(mote_train_mask(m, layers, turn == 2 ? next_random() : 0) == MOTE_OK);
        expect(frozen || is_harmless(mote_learn(m, x, target, 0.05f, &loss)));
    }
    expect(mote_train_mask(m, m->trainable, 0) == MOTE_OK);
    (void)mote_learn_with(m, x, target, &plain, &loss);
    (void)mote_learn_with(m, x, target, &heavy, &loss);
    free(target);
    if (mote_grow(m) == MOTE_OK) {
        target = make_target(m);
        (void)mote_learn(m, x, target, 0.05f, &loss);
        free(target);
    }
    (void)mote_parameters(m, &count);
    expect(count * sizeof(float) <= mote_header(m)->params);
    for (uint32_t layer = 0; layer < m->layers; layer++) {
        expect(mote_layer(m, layer, &first, &count) == MOTE_OK && (first + count) * 4 <= mote_header(m)->params);
    }
}

static void run(const uint8_t *program, size_t size)
{
    const size_t need = mote_arena_bytes(program, size);
    mote_t m;
    if (need > MOST_MEMORY) {
        return;
    }
    uint8_t *arena = malloc(need > 0 ? need : 1);
    memset(arena, 0x3f, need); /* floats of 0.7 */
    if (mote_load(&m, program, size, arena, need) == MOTE_OK && mote_inputs(&m) < MOST_WORK && work(&m) <= MOST_WORK) {
        const size_t inputs = mote_inputs(&m);
        float *x = malloc(inputs * (mote_input_type(&m) == MOTE_FLOAT32 ? sizeof *x : 1));
        state = 1;
        for (size_t i = 0; i < inputs; i++) {
            if (mote_input_type(&m) == MOTE_FLOAT32) {
                x[i] = next_float() * 4.0f;
            } else {
                ((uint8_t *)x)[i] = (uint8_t)next_random();
            }
        }
        const void *y;
        expect(is_harmless(mote_infer(&m, x, &y)) && mote_output_type(&m) != 0);
        teach(&m, x);
        free(x);
    }
    free(arena);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    uint8_t *program = malloc(size > 0 ? size : 1);
    memcpy(program, data, size);
    if (size >= sizeof(mote_header_t) && (data[3] & 0x20) == 0) {
        mote_header_t h;
        const size_t unsummed = offsetof(mote_header_t, crc) + sizeof h.crc;
        memcpy(&h, program, sizeof h);
        h.total_size = (uint32_t)size;
        h.constants = (uint32_t)(size - sizeof h - h.tensors * sizeof(mote_tensor_t) - h.ops * sizeof(mote_op_t));
        memcpy(program, &h, sizeof h);
        h.crc = mote_crc32(0, program + unsummed, size - unsummed);
        memcpy(program, &h, sizeof h);
    }
    run(program, size);
    free(program);
    return 0;
}
