/* The topics that a node speaks on, and the filters that it subscribes to: edge/wire/topics.py has the same. */
#include <string.h>

#include "mote_node_internal.h"

static const char ROOT[] = "tinyfleet/";

static void add_text(mote_node_t *n, size_t *at, const char *text)
{
    size_t size = strlen(text);
    memcpy(n->topic + *at, text, size + 1);
    *at += size;
}

static void add_number(mote_node_t *n, size_t *at, uint32_t value)
{
    char digits[11];
    size_t i = sizeof digits - 1;
    digits[i] = 0;
    do {
        digits[--i] = (char)('0' + value % 10);
        value /= 10;
    } while (value > 0);
    add_text(n, at, digits + i);
}

static void add_hash(mote_node_t *n, size_t *at, const uint8_t model[8])
{
    static const char hex[] = "0123456789abcdef";
    for (size_t i = 0; i < 8; i++) {
        n->topic[(*at)++] = hex[model[i] >> 4];
        n->topic[(*at)++] = hex[model[i] & 15];
    }
    n->topic[*at] = 0;
}

static size_t begin_topic(mote_node_t *n)
{
    size_t at = 0;
    add_text(n, &at, ROOT);
    add_text(n, &at, n->config.fleet);
    return at;
}

const char *mote_node_device_topic(mote_node_t *n, const char *kind)
{
    size_t at = begin_topic(n);
    add_text(n, &at, "/devices/");
    add_text(n, &at, n->config.id);
    add_text(n, &at, kind);
    return n->topic;
}

const char *mote_node_group_topic(mote_node_t *n, uint32_t group)
{
    size_t at = begin_topic(n);
    add_text(n, &at, "/groups/");
    add_text(n, &at, n->config.groups[group]);
    add_text(n, &at, "/command");
    return n->topic;
}

const char *mote_node_time_topic(mote_node_t *n)
{
    size_t at = begin_topic(n);
    add_text(n, &at, "/time");
    return n->topic;
}

const char *mote_node_chunk_filter(mote_node_t *n, uint32_t state, uint32_t run, uint32_t round, const uint8_t model[8])
{
    size_t at = begin_topic(n);
    if (state == WANT_PARAMETERS) {
        add_text(n, &at, "/runs/");
        add_number(n, &at, run);
        add_text(n, &at, "/");
        add_number(n, &at, round);
    } else {
        add_text(n, &at, "/models/");
        add_hash(n, &at, model);
    }
    add_text(n, &at, "/+");
    return n->topic;
}
