/* Start-up of a Cortex-M core, M0 to M55: the vector table, the FPU, initialised and zeroed memory, then main.
 *
 * Registers: ARMv7-M Architecture Reference Manual (DDI 0403), B3.2; they are the same in ARMv6-M (DDI 0419) and
 * ARMv8-M (DDI 0553).
 */
#include "board.h"

#define SCB_AIRCR (*(volatile uint32_t *)0xE000ED0Cu)
#define SCB_CPACR (*(volatile uint32_t *)0xE000ED88u)
#define AIRCR_SYSRESETREQ 0x05FA0004u /* the key and the request bit */
#define CPACR_CP10_CP11 0x00F00000u   /* full access to the floating-point unit, and to vectors */

/* Named by the linker script. */
extern uint32_t board_stack_top[];
extern uint32_t board_data_load[], board_data_start[], board_data_end[];
extern uint32_t board_bss_start[], board_bss_end[];

int main(void);
void board_start(void);
void systick_interrupt(void);
void uart_interrupt(void);

void board_reset(void)
{
    __asm volatile("dsb" ::: "memory");
    SCB_AIRCR = AIRCR_SYSRESETREQ;
    for (;;) {
    }
}

void board_start(void)
{
#ifdef __ARM_FP
    SCB_CPACR |= CPACR_CP10_CP11;
    __asm volatile("dsb\n\tisb" ::: "memory");
#endif
    const uint32_t *from = board_data_load;
    for (uint32_t *to = board_data_start; to < board_data_end;) {
        *to++ = *from++;
    }
    for (uint32_t *to = board_bss_start; to < board_bss_end;) {
        *to++ = 0;
    }
    (void)main();
    board_fault(); /* no program returns */
}

static void fault(void)
{
    board_fault();
}

/* Programs that use neither the clock nor the UART leave these out. */
__attribute__((weak)) void systick_interrupt(void)
{
    board_fault();
}
__attribute__((weak)) void uart_interrupt(void)
{
    board_fault();
}

typedef void (*vector_t)(void);

__attribute__((section(".vectors"), used)) static const struct {
    uint32_t *stack;
    vector_t system[15];
#ifdef BOARD_UART_BASE
    vector_t external[BOARD_UART_RX_IRQ + 1];
#endif
} vectors = {
    board_stack_top,
    {board_start, fault, fault, fault, fault, fault, 0, 0, 0, 0, fault, fault, 0, fault, systick_interrupt},
#ifdef BOARD_UART_BASE
    {[BOARD_UART_RX_IRQ] = uart_interrupt},
#endif
};
