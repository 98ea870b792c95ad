/* The flash of Nordic's nRF51 and its controller (nRF51 Series Reference Manual 3.0, chapter 6). It is read as memory
 * and written by words, and the core waits meanwhile. The nRF52's registers are the same. */
#include <string.h>

#include "device.h"
#include "flash.h"

#define NVMC_READY (*(volatile uint32_t *)0x4001E400u)
#define NVMC_CONFIG (*(volatile uint32_t *)0x4001E504u)
#define NVMC_ERASEPAGE (*(volatile uint32_t *)0x4001E508u)

enum { READ_ONLY = 0, WRITE = 1, ERASE = 2 };

static void wait(void)
{
    while (!(NVMC_READY & 1u)) {
    }
}

static void configure(uint32_t config)
{
    NVMC_CONFIG = config;
    wait();
}

static int read_at(void *context, uint32_t at, void *out, uint32_t size)
{
    (void)context;
    memcpy(out, (const uint8_t *)(DEVICE_STORE_ADDRESS + at), size);
    return MOTE_OK;
}

static int write_at(void *context, uint32_t at, const void *bytes, uint32_t size)
{
    const uint8_t *from = bytes;
    int error = MOTE_OK;
    (void)context;
    configure(WRITE);
    for (uint32_t done = 0; done < size; done += 4) {
        volatile uint32_t *to = (volatile uint32_t *)(DEVICE_STORE_ADDRESS + at + done);
        uint32_t word;
        memcpy(&word, from + done, sizeof word);
        *to = word;
        wait();
        if (*to != word) {
            error = MOTE_ERR_STORE;
        }
    }
    configure(READ_ONLY);
    return error;
}

static int erase_page(void *context, uint32_t page)
{
    (void)context;
    configure(ERASE);
    NVMC_ERASEPAGE = DEVICE_STORE_ADDRESS + page * DEVICE_STORE_PAGE_SIZE;
    configure(READ_ONLY);
    return MOTE_OK;
}

mote_flash_t flash_pages(void)
{
    const mote_flash_t flash = {
        NULL, read_at, write_at, erase_page, DEVICE_STORE_PAGE_SIZE, DEVICE_STORE_PAGES, DEVICE_STORE_UNIT};
    return flash;
}
