/* Arm semihosting (Semihosting for AArch32 and AArch64, Arm 100863): operations SYS_WRITE0 and SYS_EXIT_EXTENDED. */
#include "semihost.h"
#include "board.h"

enum { SYS_WRITE0 = 0x04, SYS_EXIT_EXTENDED = 0x20, ADP_STOPPED_APPLICATION_EXIT = 0x20026 };

static void call(int operation, const void *argument)
{
    register int r0 __asm("r0") = operation;
    register const void *r1 __asm("r1") = argument;
    __asm volatile("bkpt 0xAB" : "+r"(r0) : "r"(r1) : "memory");
}

void semihost_print(const char *text)
{
    call(SYS_WRITE0, text);
}

void semihost_number(uint64_t value, unsigned base)
{
    char text[21];
    char *at = text + sizeof text - 1;
    *at = '\0';
    do {
        *--at = "0123456789abcdef"[value % base];
        value /= base;
    } while (value != 0);
    semihost_print(at);
}

void semihost_exit(int status)
{
    const uint32_t block[2] = {ADP_STOPPED_APPLICATION_EXIT, (uint32_t)status};
    call(SYS_EXIT_EXTENDED, block);
    for (;;) {
    }
}

/* A program that measures or checks something ends on a fault. */
void board_fault(void)
{
    semihost_exit(70);
}
