/* A line to the host through the debugger or the emulator. For benchmarks and checks only: without a host that listens
 * the core stops at the first call. */
#ifndef SEMIHOST_H
#define SEMIHOST_H

#include <stdint.h>

void semihost_print(const char *text);

/* Prints an unsigned number in base 10 or 16. */
void semihost_number(uint64_t value, unsigned base);

/* Ends the emulator with this exit status. */
void semihost_exit(int status) __attribute__((noreturn));

#endif
