/* How many instructions one training step takes. Prints `name value` lines through semihosting and ends.
 *
 * Time is the 24-bit SysTick counter, extended by its wraps. In an emulator whose clock runs by instructions a tick is
 * a fixed number of them: `loop_instructions` and `loop_ticks` of a plain loop tell the reader which.
 */
#include <stddef.h>

#include "board.h"
#include "device.h"
#include "mote.h"
#include "semihost.h"

#define SYST_CSR (*(volatile uint32_t *)0xE000E010u)
#define SYST_RVR (*(volatile uint32_t *)0xE000E014u)
#define SYST_CVR (*(volatile uint32_t *)0xE000E018u)
#define SYST_MAX 0xFFFFFFu

enum { STEPS = 500, LOOPS = 100000 };

float mote_arena[DEVICE_ARENA_BYTES / sizeof(float)];
static float prototypes[DEVICE_OUTPUTS][DEVICE_INPUTS];
static float sample[DEVICE_INPUTS];
static volatile uint32_t wraps;

void systick_interrupt(void);
void systick_interrupt(void)
{
    wraps++;
}

void board_fault(void)
{
    semihost_exit(70);
}

static uint64_t ticks(void)
{
    for (;;) {
        const uint32_t before = wraps;
        const uint32_t left = SYST_CVR;
        if (before == wraps) {
            return ((uint64_t)before << 24) + (SYST_MAX - left);
        }
    }
}

/* Uniform in [-1, 1): xorshift32 (Marsaglia, 2003). */
static float noise(void)
{
    static uint32_t state = 12345u;
    state ^= state << 13;
    state ^= state >> 17;
    state ^= state << 5;
    return (float)(int32_t)state * (1.0f / 2147483648.0f);
}

/* The least ticks of a loop of 2 * loops instructions and of reading the clock twice. The least: an emulator takes
 * longer over code that it meets for the first time. */
static uint64_t loop_ticks(uint32_t loops)
{
    uint64_t least = UINT64_MAX;
    for (int turn = 0; turn < 3; turn++) {
        uint32_t left = loops;
        const uint64_t start = ticks();
        __asm volatile("1: subs %0, #1\n\tbne 1b" : "+r"(left)::"cc");
        const uint64_t took = ticks() - start;
        least = took < least ? took : least;
    }
    return least;
}

static void line(const char *name, uint64_t value)
{
    semihost_print(name);
    semihost_print(" ");
    semihost_number(value, 10);
    semihost_print("\n");
}

static void check(int status)
{
    if (status != MOTE_OK) {
        line("error", (uint64_t)(uint32_t)-status);
        semihost_exit(1);
    }
}

int main(void)
{
    mote_t m;
    size_t count;
    check(mote_load(&m, device_program, DEVICE_PROGRAM_BYTES, mote_arena, sizeof mote_arena));
    float *parameters = mote_parameters(&m, &count);
    for (size_t i = 0; i < count; i++) {
        parameters[i] = 0.2f * noise();
    }
    for (size_t c = 0; c < DEVICE_OUTPUTS; c++) {
        for (size_t i = 0; i < DEVICE_INPUTS; i++) {
            prototypes[c][i] = noise();
        }
    }

    SYST_RVR = SYST_MAX;
    SYST_CVR = 0;
    SYST_CSR = 7; /* on, with its interrupt, from the core's clock */

    const uint64_t overhead = loop_ticks(1); /* of reading the clock */
    line("loop_instructions", 2u * LOOPS - 2u);
    line("loop_ticks", loop_ticks(LOOPS) - overhead);
    uint64_t least = UINT64_MAX, most = 0, total = 0;
    for (size_t step = 0; step < STEPS; step++) {
        const size_t class = step % DEVICE_OUTPUTS;
        for (size_t i = 0; i < DEVICE_INPUTS; i++) {
            sample[i] = prototypes[class][i] + 0.5f * noise();
        }
        const float target = (float)class;
        float loss;
        const uint64_t start = ticks();
        const int status = mote_learn(&m, sample, &target, 0.02f, &loss);
        const uint64_t took = ticks() - start - overhead;
        check(status);
        least = took < least ? took : least;
        most = took > most ? took : most;
        total += took;
    }
    line("steps", STEPS);
    line("least_ticks", least);
    line("most_ticks", most);
    line("total_ticks", total);
    semihost_exit(0);
}
