/* What the node keeps through a reset: records of its store. edge/wire/protocol.cddl does not know them; a device alone
 * reads its own. Numbers are as in memory.
 *
 * A program is written under the key that is not in use, before the record that names it, so that a cut of the power
 * leaves the old one or the new one.
 */
#include <string.h>

#include "mote_node_internal.h"

/* Keys of the records. */
enum { KEEP_BOOTS = 1, KEEP_COUNTERS, KEEP_KEYS, KEEP_MODEL, KEEP_WEIGHTS, KEEP_PROGRAM };

typedef struct {
    uint64_t ceiling[1 + MOTE_GROUPS];
    uint32_t newest, unused;
} counters_t;

/* The public keys, and which command key they came with: another one means another enrolment. */
typedef struct {
    uint8_t current[MOTE_KEY], next[MOTE_KEY], root[MOTE_KEY];
    uint32_t version;
} keys_t;

typedef struct {
    mote_manifest_t manifest;
    uint32_t program; /* whether it is under KEEP_PROGRAM or KEEP_PROGRAM + 1 */
} model_t;

static int has_store(const mote_node_t *n)
{
    return n->config.keep.get != NULL;
}

static int get(const mote_node_t *n, uint32_t key, void *out, size_t size)
{
    return has_store(n) && n->config.keep.get(n->config.keep.context, key, out, size) == (int)size;
}

static int set(const mote_node_t *n, uint32_t key, const void *data, size_t size)
{
    return has_store(n) ? n->config.keep.set(n->config.keep.context, key, data, size) : MOTE_OK;
}

int mote_node_keep_counters(const mote_node_t *n)
{
    counters_t record;
    memset(&record, 0, sizeof record);
    for (uint32_t i = 0; i < 1 + MOTE_GROUPS; i++) {
        record.ceiling[i] = n->counter[i].ceiling;
    }
    record.newest = n->newest;
    return set(n, KEEP_COUNTERS, &record, sizeof record);
}

int mote_node_keep_keys(const mote_node_t *n)
{
    keys_t record;
    memset(&record, 0, sizeof record);
    memcpy(record.current, n->keys.current, MOTE_KEY);
    memcpy(record.next, n->keys.next, MOTE_KEY);
    memcpy(record.root, n->keys.root, MOTE_KEY);
    record.version = n->keys.version;
    return set(n, KEEP_KEYS, &record, sizeof record);
}

/* The keys that were kept, unless those that the device was given since then are of another root or newer. */
static void restore_keys(mote_node_t *n)
{
    keys_t record;
    if (n->config.keys == NULL) {
        return;
    }
    n->keys = *n->config.keys;
    if (get(n, KEEP_KEYS, &record, sizeof record) && record.version > n->keys.version &&
        memcmp(record.root, n->keys.root, MOTE_KEY) == 0) {
        memcpy(n->keys.current, record.current, MOTE_KEY);
        memcpy(n->keys.next, record.next, MOTE_KEY);
        n->keys.version = record.version;
    }
}

int mote_node_keep_model(mote_node_t *n)
{
    model_t record;
    if (!has_store(n)) {
        return MOTE_OK;
    }
    uint32_t other = get(n, KEEP_MODEL, &record, sizeof record) && record.program == 0;
    memset(&record, 0, sizeof record);
    record.manifest = n->manifest[n->slot - 1];
    record.program = other;
    int error = set(n, KEEP_PROGRAM + other, n->config.model_slot[n->slot - 1], record.manifest.size);
    if (error == MOTE_OK) {
        error = set(n, KEEP_MODEL, &record, sizeof record);
    }
    if (error == MOTE_OK) {
        (void)set(n, KEEP_PROGRAM + (1 - other), NULL, 0); /* room for the next one; left over, it is replaced then */
    }
    return error;
}

static void restore_model(mote_node_t *n)
{
    model_t record;
    uint8_t *slot = n->config.model_slot[0];
    if (slot == NULL || !get(n, KEEP_MODEL, &record, sizeof record) || record.program > 1) {
        return;
    }
    if (record.manifest.version > n->newest) {
        n->newest = record.manifest.version;
    }
    if (record.manifest.size <= n->config.model_slot_size &&
        get(n, KEEP_PROGRAM + record.program, slot, record.manifest.size)) {
        mote_node_restore_program(n, &record.manifest);
    }
}

/* The weights lie at the beginning of the arena; the id of their model is written behind them for as long as they are
 * kept. */
static uint8_t *weights_and_id(mote_node_t *n, size_t *size)
{
    size_t params = mote_header(&n->mote)->params;
    *size = params + sizeof n->model;
    return *size <= n->config.arena_size ? n->mote.arena + params : NULL;
}

int mote_node_keep_weights(mote_node_t *n)
{
    uint8_t behind[sizeof n->model];
    size_t size = 0;
    uint8_t *id = weights_and_id(n, &size);
    if (!has_store(n) || id == NULL) {
        return MOTE_OK;
    }
    memcpy(behind, id, sizeof behind);
    memcpy(id, n->model, sizeof n->model);
    int error = set(n, KEEP_WEIGHTS, n->mote.arena, size);
    memcpy(id, behind, sizeof behind);
    return error;
}

static void restore_weights(mote_node_t *n)
{
    uint8_t behind[sizeof n->model];
    size_t size = 0, count = 0;
    uint8_t *id = weights_and_id(n, &size);
    if (!has_store(n) || n->config.keep_every == 0 || id == NULL) {
        return;
    }
    memcpy(behind, id, sizeof behind);
    int good = get(n, KEEP_WEIGHTS, n->mote.arena, size) && memcmp(id, n->model, sizeof n->model) == 0;
    memcpy(id, behind, sizeof behind);
    const float *w = mote_parameters(&n->mote, &count);
    if (!good || !mote_all_finite(w, count)) {
        (void)mote_node_reload(n); /* they are another model's: begin with the program's own */
    }
}

void mote_node_restore(mote_node_t *n)
{
    counters_t record;
    restore_keys(n);
    if (get(n, KEEP_COUNTERS, &record, sizeof record)) {
        n->newest = record.newest;
        for (uint32_t i = 0; i < 1 + MOTE_GROUPS; i++) {
            n->counter[i].last = n->counter[i].ceiling = record.ceiling[i];
        }
    }
    (void)get(n, KEEP_BOOTS, &n->boots, sizeof n->boots);
    n->boots++;
    (void)set(n, KEEP_BOOTS, &n->boots, sizeof n->boots);
    restore_model(n);
    restore_weights(n);
}

int mote_node_forget(mote_node_t *n)
{
    static const uint32_t keys[] = {KEEP_MODEL, KEEP_PROGRAM, KEEP_PROGRAM + 1, KEEP_WEIGHTS, KEEP_BOOTS};
    int error = mote_node_keep_counters(n); /* with the version of the model that is forgotten */
    for (size_t i = 0; i < sizeof keys / sizeof keys[0] && error == MOTE_OK; i++) {
        error = set(n, keys[i], NULL, 0);
    }
    if (error == MOTE_OK) {
        n->boots = 0;
    }
    return error;
}
