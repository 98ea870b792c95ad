/* What of the learned parameters goes back: which of them, in which parts, and as which bytes. */
#include "mote_update.h"

#include <string.h>

#include "mote_internal.h"

static uint32_t float_bits(float v)
{
    uint32_t bits;
    memcpy(&bits, &v, sizeof bits);
    return bits;
}

/* The f16 nearest to v, ties to even (IEEE 754); |v| < 65520, as mote_update_is_finite has seen to. */
static uint16_t to_half(float v)
{
    uint32_t bits = float_bits(v);
    uint32_t sign = bits >> 16 & 0x8000u;
    uint32_t magnitude = bits & 0x7fffffffu;
    uint32_t half, rest, tie;
    if (magnitude < 0x38800000u) { /* below 2^-14: subnormal, counted in 2^-24 */
        uint32_t shift = 126 - (magnitude >> 23);
        if (shift > 24) {
            return (uint16_t)sign; /* below 2^-25 */
        }
        uint32_t fraction = (magnitude & 0x7fffffu) | 0x800000u;
        half = fraction >> shift;
        rest = fraction & ((1u << shift) - 1);
        tie = 1u << (shift - 1);
    } else {
        half = (magnitude - 0x38000000u) >> 13;
        rest = magnitude & 0x1fffu;
        tie = 0x1000u;
    }
    half += rest > tie || (rest == tie && (half & 1)); /* may carry into the exponent, which is right */
    return (uint16_t)(sign | half);
}

static size_t write_number(const mote_node_t *n, uint8_t *at, float v)
{
    if (n->half) {
        uint16_t half = to_half(v);
        memcpy(at, &half, sizeof half);
        return sizeof half;
    }
    memcpy(at, &v, sizeof v);
    return sizeof v;
}

static float parameter(const mote_node_t *n, uint32_t i)
{
    return ((const float *)(const void *)n->mote.arena)[i];
}

static float change(const mote_node_t *n, uint32_t i)
{
    return parameter(n, i) - n->config.base[i];
}

/* The first stretch of shared parameters that ends behind `from`: [*first, *end), 0 if there is none. */
static int shared_range(const mote_node_t *n, uint32_t from, uint32_t *first, uint32_t *end)
{
    int found = 0;
    for (uint32_t layer = 0; layer < n->mote.layers; layer++) {
        size_t at = 0, count = 0;
        (void)mote_layer(&n->mote, layer, &at, &count);
        if (!(n->shared >> layer & 1) || at + count <= from) {
            continue;
        }
        if (!found) {
            *first = at > from ? (uint32_t)at : from;
        } else if (*end != at) {
            break;
        }
        *end = (uint32_t)(at + count);
        found = 1;
    }
    return found;
}

/* Walks over the shared parameters: for (i = next_shared(n, 0, &end); i < end; i = next_shared(n, i + 1, &end)),
 * end = 0 before the first call. Returns UINT32_MAX, with end 0, behind the last one. */
static uint32_t next_shared(const mote_node_t *n, uint32_t i, uint32_t *end)
{
    uint32_t first = i;
    if (i < *end) {
        return i;
    }
    if (!shared_range(n, i, &first, end)) {
        *end = 0;
        return UINT32_MAX;
    }
    return first;
}

static uint32_t change_bits(const mote_node_t *n, uint32_t i)
{
    return float_bits(change(n, i)) & 0x7fffffffu;
}

/* How many shared parameters have changed by at least this much. */
static uint32_t count_changes(const mote_node_t *n, uint32_t bits)
{
    uint32_t count = 0, end = 0;
    for (uint32_t i = next_shared(n, 0, &end); i < end; i = next_shared(n, i + 1, &end)) {
        count += change_bits(n, i) >= bits;
    }
    return count;
}

int mote_update_is_finite(const mote_node_t *n)
{
    uint32_t limit = n->half ? 0x477ff000u : 0x7f800000u; /* 65520, which f16 rounds to infinity; infinity */
    uint32_t end = 0;
    for (uint32_t i = next_shared(n, 0, &end); i < end; i = next_shared(n, i + 1, &end)) {
        uint32_t bits = mote_sends_changes(n) ? change_bits(n, i) : float_bits(parameter(n, i)) & 0x7fffffffu;
        if (bits >= limit) {
            return 0;
        }
    }
    return 1;
}

int mote_update_clip(mote_node_t *n)
{
    float *w = (float *)(void *)n->mote.arena, sum = 0.0f;
    uint32_t end = 0;
    for (uint32_t i = next_shared(n, 0, &end); i < end; i = next_shared(n, i + 1, &end)) {
        float by = change(n, i);
        sum += by * by;
    }
    float norm = mote_sqrtf(sum);
    if (!mote_finite(norm)) {
        return 0;
    }
    if (norm <= n->clip) {
        return 1;
    }
    float scale = n->clip / norm;
    end = 0;
    for (uint32_t i = next_shared(n, 0, &end); i < end; i = next_shared(n, i + 1, &end)) {
        w[i] = n->config.base[i] + scale * change(n, i);
    }
    return 1;
}

/* The k-th largest change, by bisecting on the bits: those of positive floats are ordered as the floats are. Changes
 * of 0 are never sent. Of equal ones at the threshold the first are, so that exactly k are. */
static void choose_threshold(mote_node_t *n)
{
    uint32_t count = count_changes(n, 0);
    float wanted = n->density * (float)count;
    uint32_t k = (uint32_t)wanted;
    k += (float)k < wanted || k == 0;
    uint32_t low = 1, high = 0x7f800000u; /* at least k changes reach low, or low is 1; fewer reach high */
    while (high - low > 1) {
        uint32_t middle = low + (high - low) / 2;
        if (count_changes(n, middle) >= k) {
            low = middle;
        } else {
            high = middle;
        }
    }
    n->threshold = low;
    n->ties = k - count_changes(n, low + 1);
}

/* Whether parameter i is sent; *ties is how many changes equal to the threshold still are. */
static int is_chosen(const mote_node_t *n, uint32_t i, uint32_t *ties)
{
    uint32_t bits = change_bits(n, i);
    if (bits == n->threshold && *ties > 0) {
        (*ties)--;
        return 1;
    }
    return bits > n->threshold;
}

static uint32_t varint_size(uint32_t value)
{
    uint32_t size = 1;
    while (value >= 0x80) {
        value >>= 7;
        size++;
    }
    return size;
}

int mote_update_next_part(const mote_node_t *n, uint32_t from, uint32_t ties, mote_part_t *part)
{
    uint32_t room = (uint32_t)(n->config.out_size - MOTE_REPLY_HEAD);
    uint32_t size = mote_number_size(n), end = 0;
    part->from = part->next = from;
    part->ties = ties;
    part->count = part->gaps = 0;
    if (!mote_is_sparse(n)) {
        if (!shared_range(n, from, &part->from, &end)) {
            return 0;
        }
        part->count = end - part->from < room / size ? end - part->from : room / size;
        part->next = part->from + part->count;
        return 1;
    }
    uint32_t before = UINT32_MAX; /* the parameter before the first */
    for (uint32_t i = next_shared(n, from, &end); i < end; i = next_shared(n, i + 1, &end)) {
        uint32_t left = part->ties;
        if (!is_chosen(n, i, &left)) {
            continue;
        }
        uint32_t gap = varint_size(i - before - 1);
        if (part->gaps + gap + (part->count + 1) * size > room) {
            break;
        }
        part->gaps += gap;
        part->count++;
        part->ties = left;
        part->next = i + 1;
        before = i;
    }
    return part->count > 0;
}

static void write_dense(const mote_node_t *n, const mote_part_t *part, uint8_t *values)
{
    for (uint32_t i = 0; i < part->count; i++) {
        uint32_t at = part->from + i;
        values += write_number(n, values, mote_sends_changes(n) ? change(n, at) : parameter(n, at));
    }
}

static void write_sparse(const mote_node_t *n, const mote_part_t *part, uint32_t ties, uint8_t *gaps, uint8_t *values)
{
    uint32_t before = UINT32_MAX, end = 0;
    for (uint32_t i = next_shared(n, part->from, &end); i < part->next; i = next_shared(n, i + 1, &end)) {
        if (!is_chosen(n, i, &ties)) {
            continue;
        }
        uint32_t gap = i - before - 1;
        while (gap >= 0x80) {
            *gaps++ = (uint8_t)(gap | 0x80);
            gap >>= 7;
        }
        *gaps++ = (uint8_t)gap;
        values += write_number(n, values, change(n, i));
        before = i;
    }
}

uint32_t mote_update_choose(mote_node_t *n)
{
    uint32_t parts = 0;
    mote_part_t part = {0, 0, 0, 0, 0};
    n->ties = 0;
    if (mote_is_sparse(n)) {
        choose_threshold(n);
    }
    part.ties = n->ties;
    while (mote_update_next_part(n, part.next, part.ties, &part)) {
        parts++;
    }
    return parts;
}

void mote_update_write(const mote_node_t *n, const mote_part_t *part, uint32_t ties, uint8_t *gaps)
{
    if (mote_is_sparse(n)) {
        write_sparse(n, part, ties, gaps, gaps + part->gaps);
    } else {
        write_dense(n, part, gaps);
    }
}
