/* How many instructions an inference and a training step take. Prints `name value` lines through semihosting and ends.
 *
 * Time is the 24-bit SysTick counter, extended by its wraps. In an emulator whose clock runs by instructions a tick is
 * a fixed number of them: `loop_instructions` and `loop_ticks` of a plain loop tell the reader which.
 */
#include <stddef.h>

#include "bench.h"
#include "board.h"
#include "device.h"
#include "semihost.h"

#define SYST_CSR (*(volatile uint32_t *)0xE000E010u)
#define SYST_RVR (*(volatile uint32_t *)0xE000E014u)
#define SYST_CVR (*(volatile uint32_t *)0xE000E018u)
#define SYST_MAX 0xFFFFFFu

enum { LOOPS = 100000 };

static volatile uint32_t wraps;

void systick_interrupt(void);
void systick_interrupt(void)
{
    wraps++;
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

/* The least ticks of a loop of 2 * loops instructions and of reading the clock twice. The least: an emulator takes
 * longer over code that it meets for the first time. */
static uint64_t loop_ticks(uint32_t loops)
{
    uint64_t least = UINT64_MAX;
    for (int turn = 0; turn < 3; turn++) {
        uint32_t left = loops;
        const uint64_t start = ticks();
        __asm volatile("1: subs %0, #1\n\tbne 1b" : "+l"(left)::"cc");
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
    if (status < 0) {
        line("error", (uint64_t)-status);
        semihost_exit(1);
    }
}

static void measure(const char *least_name, const char *most_name, const char *total_name, int (*step)(void),
                    uint64_t overhead)
{
    uint64_t least = UINT64_MAX, most = 0, total = 0;
    for (uint32_t i = 0; i < DEVICE_STEPS; i++) {
        bench_sample(i);
        const uint64_t start = ticks();
        const int status = step();
        const uint64_t took = ticks() - start - overhead;
        check(status);
        least = took < least ? took : least;
        most = took > most ? took : most;
        total += took;
    }
    line(least_name, least);
    line(most_name, most);
    line(total_name, total);
}

int main(void)
{
    const int learns = bench_start();
    check(learns);

    SYST_RVR = SYST_MAX;
    SYST_CVR = 0;
    SYST_CSR = 7; /* on, with its interrupt, from the core's clock */

    const uint64_t overhead = loop_ticks(1); /* of reading the clock */
    line("loop_instructions", 2u * LOOPS - 2u);
    line("loop_ticks", loop_ticks(LOOPS) - overhead);
    line("steps", DEVICE_STEPS);
    measure("infer_least", "infer_most", "infer_total", bench_infer, overhead);
    if (learns) {
        measure("learn_least", "learn_most", "learn_total", bench_learn, overhead);
    }
    semihost_exit(0);
}
