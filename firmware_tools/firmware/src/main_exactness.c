/* Learns made-up samples and prints a checksum of all that it has learned, so that targets can be compared to the bit;
 * of a program in which nothing trains, a checksum of all that it infers.
 *
 * Every target runs this file on the same programs, which lie in `device_cases`, each behind its training_case_t:
 * boards through semihosting, others with a semihost.h of their own. Prints, for every program, `bytes CRC-32
 * loss-bits` of what trains (or of outputs) and of the last loss, in base 16, and ends.
 */
#include <string.h>

#include "device.h"
#include "mote_internal.h"
#include "semihost.h"

typedef struct {
    uint32_t size; /* of the program */
    uint32_t steps;
    uint32_t seed;
    mote_sgd_t sgd;
} training_case_t;

uint32_t mote_arena[DEVICE_ARENA_BYTES / sizeof(uint32_t)];
static union {
    float real[DEVICE_INPUTS];
    int8_t quantized[DEVICE_INPUTS];
} x;
static uint32_t state;

static void check(int status)
{
    if (status != MOTE_OK) {
        semihost_print("error ");
        semihost_print(mote_error_name(status));
        semihost_print("\n");
        semihost_exit(1);
    }
}

/* xorshift32 (Marsaglia, 2003). */
static uint32_t next_random(void)
{
    state ^= state << 13;
    state ^= state >> 17;
    state ^= state << 5;
    return state;
}

/* Noise in which every classes-th element, from the class's own on, stands out. */
static void make_sample(const mote_t *m, uint32_t class, uint32_t classes)
{
    for (uint32_t i = 0; i < mote_inputs(m); i++) {
        const int32_t noise = (int32_t)(next_random() >> 25) - 64, mark = i % classes == class ? 48 : 0;
        if (mote_input_type(m) == MOTE_INT8) {
            x.quantized[i] = (int8_t)(noise + mark);
        } else {
            x.real[i] = (float)(noise + mark) * 0.0078125f;
        }
    }
}

static void line(uint32_t bytes, uint32_t crc, uint32_t bits)
{
    semihost_number(bytes, 16);
    semihost_print(" ");
    semihost_number(crc, 16);
    semihost_print(" ");
    semihost_number(bits, 16);
    semihost_print("\n");
}

/* Bytes of all values; the first sample has the greatest alone. */
static void infer(mote_t *m, const training_case_t *training)
{
    const uint32_t bytes = (uint32_t)mote_outputs(m) * (mote_output_type(m) == MOTE_INT8 ? 1u : 4u);
    uint32_t crc = 0;
    state = training->seed;
    for (uint32_t step = 0; step < training->steps; step++) {
        const void *y;
        for (uint32_t i = 0; i < mote_inputs(m); i++) {
            x.quantized[i] = step == 0 ? INT8_MAX : (int8_t)(next_random() >> 24);
        }
        check(mote_infer(m, &x, &y));
        crc = mote_crc32(crc, y, bytes);
    }
    line(training->steps * bytes, crc, 0);
}

static void run(const training_case_t *training)
{
    mote_t m;
    float loss = 0.0f;
    uint32_t bits;
    check(mote_load(&m, training + 1, training->size, mote_arena, sizeof mote_arena));
    if (m.trainable == 0) {
        infer(&m, training);
        return;
    }
    const uint32_t classes = (uint32_t)mote_outputs(&m);
    state = training->seed;
    for (uint32_t step = 0; step < training->steps; step++) {
        const uint32_t class = (next_random() >> 8) % classes;
        const float target = (float)class;
        make_sample(&m, class, classes);
        if (training->sgd.momentum > 0.0f) {
            check(mote_learn_with(&m, &x, &target, &training->sgd, &loss));
        } else {
            check(mote_learn(&m, &x, &target, training->sgd.rate, &loss));
        }
    }
    memcpy(&bits, &loss, sizeof bits);
    line(mote_header(&m)->params, mote_crc32(0, m.arena, mote_header(&m)->params), bits);
}

int main(void)
{
    const uint8_t *at = (const uint8_t *)device_cases, *end = at + DEVICE_CASES_BYTES;
    while (at < end) {
        const training_case_t *training = (const training_case_t *)(const void *)at; /* aligned by the build */
        run(training);
        at += sizeof *training + training->size;
    }
    semihost_exit(0);
}
