/* semihost.h for a program of Linux, so that firmware's checks run there as they are. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "semihost.h"

void semihost_print(const char *text)
{
    fputs(text, stdout);
}

void semihost_number(uint64_t value, unsigned base)
{
    printf(base == 16 ? "%" PRIx64 : "%" PRIu64, value);
}

void semihost_exit(int status)
{
    exit(status);
}
