/* What every firmware program of a board has: reset, faults, sleep and the SysTick clock.
 *
 * The build defines, from the board's description: BOARD_CLOCK_HZ and, where it has a serial port, BOARD_UART_BASE,
 * BOARD_UART_RX_IRQ and BOARD_UART_BAUD.
 */
#ifndef BOARD_H
#define BOARD_H

#include <stdint.h>

/* Starts the core again from its reset vector. */
void board_reset(void) __attribute__((noreturn));

/* Called on any fault; each program decides: a node resets, a benchmark ends with an error. */
void board_fault(void) __attribute__((noreturn));

/* Interrupts off, and on again. Between the two, board_sleep returns as soon as an interrupt is pending. */
static inline void board_mask(void)
{
    __asm volatile("cpsid i" ::: "memory");
}
static inline void board_unmask(void)
{
    __asm volatile("cpsie i" ::: "memory");
}
static inline void board_sleep(void)
{
    __asm volatile("dsb\n\twfi" ::: "memory");
}

#endif
