/* The UART of Arm's Cortex-M System Design Kit (APB UART; Technical Reference Manual DDI 0479, 4.3). */
#include "board.h"
#include "uart.h"

typedef struct {
    volatile uint32_t data;
    volatile uint32_t state;
    volatile uint32_t control;
    volatile uint32_t interrupt; /* status; write 1 to clear */
    volatile uint32_t divider;
} cmsdk_uart_t;

#define UART ((cmsdk_uart_t *)BOARD_UART_BASE)
#define NVIC_ENABLE (*(volatile uint32_t *)(0xE000E100u + 4u * (BOARD_UART_RX_IRQ / 32u)))

enum { TX_FULL = 1u << 0, RX_FULL = 1u << 1 };
enum { TX_ENABLE = 1u << 0, RX_ENABLE = 1u << 1, RX_INTERRUPT = 1u << 3 };
enum { CLEAR_RX = 1u << 1 };

static volatile uint8_t ring[UART_RING]; /* volatile, as the counters: filled before `written` says so */
static volatile uint32_t written;        /* by the interrupt */
static volatile uint32_t read;           /* by uart_read */

void uart_interrupt(void);

void uart_interrupt(void)
{
    UART->interrupt = CLEAR_RX;
    while (UART->state & RX_FULL) {
        if (written - read == UART_RING) {
            UART->control = TX_ENABLE | RX_ENABLE; /* full: the byte stays where it is */
            return;
        }
        ring[written % UART_RING] = (uint8_t)UART->data;
        written++;
    }
}

void uart_open(void)
{
    UART->divider = BOARD_CLOCK_HZ / BOARD_UART_BAUD;
    UART->control = TX_ENABLE | RX_ENABLE | RX_INTERRUPT;
    NVIC_ENABLE = 1u << (BOARD_UART_RX_IRQ % 32u);
}

size_t uart_read(uint8_t *bytes, size_t size)
{
    size_t got = 0;
    while (got < size && read != written) {
        bytes[got++] = ring[read % UART_RING];
        read++;
    }
    if (got > 0 && !(UART->control & RX_INTERRUPT)) {
        board_mask();
        UART->control = TX_ENABLE | RX_ENABLE | RX_INTERRUPT;
        uart_interrupt(); /* takes the byte that waited, and with it the port goes on */
        board_unmask();
    }
    return got;
}

int uart_ready(void)
{
    return read != written;
}

void uart_write(const uint8_t *bytes, size_t size)
{
    for (size_t i = 0; i < size; i++) {
        while (UART->state & TX_FULL) {
        }
        UART->data = bytes[i];
    }
}
