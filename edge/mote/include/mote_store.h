/* What a device keeps through a reset: records under small numbers, in a log over pages of flash.
 *
 * The log is safe against a power cut at any moment, also while it recovers from one: a record has its old value or its
 * new one. It goes round the pages, which wears them evenly. Its format: docs/reference/store-format.md.
 */
#ifndef MOTE_STORE_H
#define MOTE_STORE_H

#include "mote.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What a node needs of a store. get writes the record under this key and returns its size; 0 if there is none, or it is
 * larger than capacity; or an error. set writes a record as a whole; size 0 removes it. MOTE_OK or an error. */
typedef struct {
    void *context;
    int (*get)(void *context, uint32_t key, void *out, size_t capacity);
    int (*set)(void *context, uint32_t key, const void *data, size_t size);
} mote_keep_t;

/* Pages of flash. Addresses count from 0. Each callback returns MOTE_OK or an error; write_at gets whole units that
 * are erased, which are of ones; erase_page makes a page of ones. */
typedef struct {
    void *context;
    int (*read_at)(void *context, uint32_t at, void *out, uint32_t size);
    int (*write_at)(void *context, uint32_t at, const void *bytes, uint32_t size);
    int (*erase_page)(void *context, uint32_t page);
    uint32_t page_size; /* bytes, at least 128, at most 65536, a multiple of the unit */
    uint32_t pages;     /* at least 3 */
    uint32_t unit;      /* bytes that are written at once: 1, 2, 4, 8 or 16 */
} mote_flash_t;

/* What is in it is the store's own. */
typedef struct {
    mote_flash_t flash;
    uint32_t head, end; /* the page that is written to, and where in it */
    uint32_t sequence;  /* of that page */
    uint32_t version;   /* the highest of a record */
    uint32_t writing;   /* the version that is being written, or 0 */
} mote_store_t;

/* Recovers what a power cut left, and formats pages that hold no log. MOTE_ERR_ARGUMENT for a geometry that cannot be;
 * else what a callback returned. */
int mote_store_open(mote_store_t *s, const mote_flash_t *flash);

/* Reads the record under this key, 1..254: its size, 0 if there is none, or an error; MOTE_ERR_STORE if it is larger.
 */
int mote_store_get(const mote_store_t *s, uint32_t key, void *out, size_t capacity);

/* Writes it, or removes it where size is 0. MOTE_ERR_STORE if there is no room for the old value and the new one. */
int mote_store_set(mote_store_t *s, uint32_t key, const void *data, size_t size);

/* Bytes that all records, and the new value of one of them, have together at most; each takes 16 more, and padding. */
uint32_t mote_store_capacity(const mote_flash_t *flash);

/* For a node. */
mote_keep_t mote_store_keep(mote_store_t *s);

#ifdef __cplusplus
}
#endif

#endif
