/* The pages of the board's flash that hold its store: DEVICE_STORE_ADDRESS, DEVICE_STORE_PAGES, DEVICE_STORE_PAGE_SIZE
 * and DEVICE_STORE_UNIT of the board's file. The linker keeps the program out of them. */
#ifndef FLASH_H
#define FLASH_H

#include "mote_store.h"

mote_flash_t flash_pages(void);

#endif
