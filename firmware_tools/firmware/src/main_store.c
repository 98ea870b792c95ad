/* Counts in the board's store, without end, beside a value that is larger than a page and that the count decides. At
 * every start it says `start COUNT LARGE`, what both are made of, or `damaged`; then `count COUNT` for each step. */
#include <string.h>

#include "board.h"
#include "device.h"
#include "flash.h"
#include "semihost.h"

enum { COUNT = 1, LARGE = 2, LARGE_BYTES = DEVICE_STORE_PAGE_SIZE + 200 };

static uint8_t large[LARGE_BYTES], found[LARGE_BYTES];
static mote_store_t store;

static void stop(const char *text)
{
    semihost_print(text);
    semihost_print("\n");
    semihost_exit(1);
}

static void line(const char *text, uint32_t number)
{
    semihost_print(text);
    semihost_print(" ");
    semihost_number(number, 10);
}

static void fill(uint32_t number)
{
    for (uint32_t i = 0; i < LARGE_BYTES; i++) {
        large[i] = (uint8_t)(number * 31u + i * 7u + (i >> 8));
    }
    memcpy(large, &number, sizeof number);
}

static uint32_t read_large(void)
{
    uint32_t number = 0;
    int size = mote_store_get(&store, LARGE, found, sizeof found);
    if (size != 0) {
        memcpy(&number, found, sizeof number);
        fill(number);
        if (size != LARGE_BYTES || memcmp(found, large, sizeof large) != 0) {
            stop("damaged");
        }
    }
    return number;
}

int main(void)
{
    const mote_flash_t flash = flash_pages();
    uint32_t count = 0;
    if (mote_store_open(&store, &flash) != MOTE_OK || mote_store_get(&store, COUNT, &count, sizeof count) < 0) {
        stop("not opened");
    }
    line("start", count);
    line("", read_large());
    semihost_print("\n");
    for (;;) {
        count++;
        fill(count);
        if (mote_store_set(&store, LARGE, large, sizeof large) != MOTE_OK ||
            mote_store_set(&store, COUNT, &count, sizeof count) != MOTE_OK) {
            stop("not set");
        }
        line("count", count);
        semihost_print("\n");
    }
}
