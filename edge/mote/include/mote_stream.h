/* A labelled data set held in memory, replayed as a stream of few-shot tasks.
 *
 * A task is `ways` of the set's classes under a random labelling 0..ways-1, or all of them under the labels that they
 * have, or samples with targets of their own, which are numbers. The first samples of every class are for learning; its
 * last quarter (at least one sample) is kept for queries, so that nothing is scored on what it was learned from. The
 * same seed gives the same task and the same samples on every target.
 */
#ifndef MOTE_STREAM_H
#define MOTE_STREAM_H

#include <stdint.h>

#include "mote_node.h"

#ifdef __cplusplus
extern "C" {
#endif

#define MOTE_STREAM_MAX_WAYS 32

typedef struct {
    const uint8_t *features; /* samples x size bytes; a feature's value is its byte times scale */
    const float *values;     /* or samples x size values; then features is NULL */
    const float *targets;    /* samples x outputs numbers to predict; NULL: the target is the label */
    const uint32_t *starts;  /* classes + 1 row numbers: class c has rows starts[c] .. starts[c + 1] - 1, at least 2 */
    uint32_t classes;        /* >= ways */
    uint32_t size;           /* features a sample */
    uint32_t outputs;        /* numbers a target */
    float scale;
    uint32_t ways;
    uint32_t fixed;  /* != 0: a class's number is its label, and ways is classes */
    uint32_t random; /* state of the generator */
    uint32_t chosen[MOTE_STREAM_MAX_WAYS];
} mote_stream_t;

/* Draws the task of this seed. Returns MOTE_OK, or MOTE_ERR_ARGUMENT if the set can't give one. */
int mote_stream_open(mote_stream_t *s, uint32_t seed);

/* The next sample: x gets size floats, y the label or the targets. query != 0 draws from the kept quarter. */
void mote_stream_next(mote_stream_t *s, int query, float *x, float *y);

/* The stream as a node's source of samples, for a program of that many inputs and of these targets. */
mote_source_t mote_stream_source(mote_stream_t *s);

#ifdef __cplusplus
}
#endif

#endif
