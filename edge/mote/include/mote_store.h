/* What a device keeps through a reset: records under small numbers, by two callbacks of its owner. */
#ifndef MOTE_STORE_H
#define MOTE_STORE_H

#include "mote.h"

#ifdef __cplusplus
extern "C" {
#endif

/* get writes the record under this key and returns its size; 0 if there is none, or it is larger than capacity; or an
 * error. set writes a record as a whole: after a power cut the old one or the new one is there; size 0 removes it. It
 * returns MOTE_OK or an error. */
typedef struct {
    void *context;
    int (*get)(void *context, uint32_t key, void *out, size_t capacity);
    int (*set)(void *context, uint32_t key, const void *data, size_t size);
} mote_keep_t;

#ifdef __cplusplus
}
#endif

#endif
