/* Few-shot tasks drawn from a data set in memory; the same on every target, since it counts in integers alone. */
#include "mote_stream.h"

#include <string.h>

#include "mote.h"

/* xorshift32 (Marsaglia 2003, "Xorshift RNGs"): period 2^32 - 1, never 0. */
static uint32_t next_random(mote_stream_t *s)
{
    uint32_t r = s->random;
    r ^= r << 13;
    r ^= r >> 17;
    r ^= r << 5;
    return s->random = r;
}

/* 0 .. n-1, by the high half of a product (Lemire 2019); its bias of n / 2^32 does not matter here. */
static uint32_t below(mote_stream_t *s, uint32_t n)
{
    return (uint32_t)(((uint64_t)next_random(s) * n) >> 32);
}

static int is_chosen(const mote_stream_t *s, uint32_t count, uint32_t class)
{
    for (uint32_t i = 0; i < count; i++) {
        if (s->chosen[i] == class) {
            return 1;
        }
    }
    return 0;
}

static int has_data(const mote_stream_t *s)
{
    return (s->features == NULL) != (s->values == NULL) && s->starts != NULL && s->size > 0 &&
           (s->targets == NULL || s->outputs > 0) && s->scale - s->scale == 0.0f;
}

static int has_ways(const mote_stream_t *s)
{
    return s->ways > 0 && s->ways <= MOTE_STREAM_MAX_WAYS && s->ways <= s->classes &&
           (!s->fixed || s->ways == s->classes);
}

/* Every class has a sample to learn from and one to be scored by. */
static int has_samples(const mote_stream_t *s)
{
    for (uint32_t c = 0; c < s->classes; c++) {
        if (s->starts[c + 1] < s->starts[c] || s->starts[c + 1] - s->starts[c] < 2) {
            return 0;
        }
    }
    return 1;
}

/* A random subset without a list of all classes (Floyd, in Bentley 1987, "A sample of brilliance") in a random order
 * (Fisher and Yates), since the order is the labelling. */
static void choose_classes(mote_stream_t *s)
{
    for (uint32_t i = 0; i < s->ways; i++) {
        uint32_t last = s->classes - s->ways + i;
        uint32_t class = below(s, last + 1);
        s->chosen[i] = is_chosen(s, i, class) ? last : class;
    }
    for (uint32_t i = s->ways - 1; i > 0; i--) {
        uint32_t j = below(s, i + 1);
        uint32_t class = s->chosen[i];
        s->chosen[i] = s->chosen[j];
        s->chosen[j] = class;
    }
}

int mote_stream_open(mote_stream_t *s, uint32_t seed)
{
    if (s == NULL || !has_data(s) || !has_ways(s) || !has_samples(s)) {
        return MOTE_ERR_ARGUMENT;
    }
    /* Neighbouring seeds must not give neighbouring states: the finaliser of MurmurHash3 (Appleby, public domain). */
    seed ^= seed >> 16;
    seed *= 0x85ebca6bu;
    seed ^= seed >> 13;
    seed *= 0xc2b2ae35u;
    seed ^= seed >> 16;
    s->random = seed == 0 ? 0x9e3779b9u : seed;
    if (s->fixed) {
        for (uint32_t i = 0; i < s->ways; i++) {
            s->chosen[i] = i;
        }
    } else {
        choose_classes(s);
    }
    return MOTE_OK;
}

void mote_stream_next(mote_stream_t *s, int query, float *x, float *y)
{
    uint32_t label = below(s, s->ways);
    uint32_t first = s->starts[s->chosen[label]];
    uint32_t count = s->starts[s->chosen[label] + 1] - first;
    uint32_t kept = count < 8 ? 1 : count / 4;
    uint32_t row = query ? first + count - kept + below(s, kept) : first + below(s, count - kept);
    size_t first_feature = (size_t)row * s->size;
    if (s->values != NULL) {
        memcpy(x, s->values + first_feature, s->size * sizeof *x);
    } else {
        for (uint32_t j = 0; j < s->size; j++) {
            x[j] = (float)s->features[first_feature + j] * s->scale;
        }
    }
    if (s->targets != NULL) {
        memcpy(y, s->targets + (size_t)row * s->outputs, s->outputs * sizeof *y);
    } else {
        *y = (float)label;
    }
}

static int source_open(void *context, uint32_t seed)
{
    return mote_stream_open(context, seed);
}

static int source_next(void *context, int query, float *x, float *y)
{
    mote_stream_next(context, query, x, y);
    return 1;
}

mote_source_t mote_stream_source(mote_stream_t *s)
{
    mote_source_t source = {s, source_open, source_next};
    return source;
}
