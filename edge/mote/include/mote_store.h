/* Placeholder, replaced by the store branch. */
#ifndef MOTE_STORE_H
#define MOTE_STORE_H

#include "mote.h"

typedef struct {
    void *context;
    int (*get)(void *context, uint32_t key, void *out, size_t capacity);
    int (*set)(void *context, uint32_t key, const void *data, size_t size);
} mote_keep_t;

#endif
