/* Learns from a stream and prints a checksum of all parameters, so that targets can be compared to the bit.
 *
 * The host does the same with the same program and samples. Prints `parameters CRC-32 loss-bits`, in base 16, and ends.
 */
#include <string.h>

#include "board.h"
#include "device.h"
#include "mote.h"
#include "mote_stream.h"
#include "semihost.h"

float mote_arena[DEVICE_ARENA_BYTES / sizeof(float)];
static float sample[DEVICE_INPUTS];

void board_fault(void)
{
    semihost_exit(70);
}

static void check(int status)
{
    if (status != MOTE_OK) {
        semihost_print("error -");
        semihost_number((uint64_t)-status, 10);
        semihost_print("\n");
        semihost_exit(1);
    }
}

int main(void)
{
    mote_t m;
    mote_stream_t stream;
    float label, loss = 0.0f;
    size_t count;
    uint32_t bits;

    memset(&stream, 0, sizeof stream);
    stream.features = device_features;
    stream.starts = (const uint32_t *)(const void *)device_starts; /* aligned by the build */
    stream.classes = DEVICE_CLASSES;
    stream.size = DEVICE_INPUTS;
    stream.scale = DEVICE_SCALE;
    stream.ways = DEVICE_WAYS;
    check(mote_load(&m, device_program, DEVICE_PROGRAM_BYTES, mote_arena, sizeof mote_arena));
    check(mote_stream_open(&stream, DEVICE_SEED));
    for (uint32_t step = 0; step < DEVICE_STEPS; step++) {
        mote_stream_next(&stream, 0, sample, &label);
        check(mote_learn(&m, sample, &label, DEVICE_RATE, &loss));
    }
    const float *parameters = mote_parameters(&m, &count);
    memcpy(&bits, &loss, sizeof bits);
    semihost_number(count, 16);
    semihost_print(" ");
    semihost_number(mote_crc32(0, parameters, count * sizeof(float)), 16);
    semihost_print(" ");
    semihost_number(bits, 16);
    semihost_print("\n");
    semihost_exit(0);
}
