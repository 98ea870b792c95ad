/* The board's serial port, 8N1. Receiving is interrupt-driven into a ring; sending waits.
 *
 * A full ring leaves the next byte in the port and stops the interrupt until there is room: a sender that can be held
 * back (an emulator does) loses nothing; one that cannot loses a frame, which the wire's protocol asks for again.
 */
#ifndef UART_H
#define UART_H

#include <stddef.h>
#include <stdint.h>

#define UART_RING 8192u /* bytes, a power of two: 0.7 s at 115,200 baud, and a round's chunk several times over */

void uart_open(void);

/* Copies up to `size` received bytes; returns how many. */
size_t uart_read(uint8_t *bytes, size_t size);

/* Whether a byte waits. */
int uart_ready(void);

void uart_write(const uint8_t *bytes, size_t size);

#endif
