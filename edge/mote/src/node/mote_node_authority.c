/* Which commands the node obeys: authentic, fresh and allowed ones.
 *
 * Authentic: sealed by a key that the node holds, for the topic that it came on. Fresh: its counter is higher than any
 * before it on that topic, and it has not expired; where the node does not know the time, the command echoes the nonce
 * of the node's status. Allowed: what the seal may carry. The cheap checks come first, so that a stranger's message, or
 * a replayed one, costs no signature's check.
 */
#include <string.h>

#include "mote_node_internal.h"
#include "protocol_decode.h"

/* Milliseconds that a counter or an expiry may be ahead of the time, over an hour: a higher counter would end all later
 * commands. */
static const uint64_t AHEAD = (uint64_t)1 << 22;
/* The same where the time is not known, in some 9,000 years. */
static const uint64_t LAST_COUNTER = (uint64_t)1 << 48;
/* A counter is stored so far ahead of itself: one write of flash for all commands of four minutes. */
static const uint64_t STEP = (uint64_t)1 << 18;

uint64_t mote_node_now(const mote_node_t *n)
{
    const mote_clock_t *clock = &n->config.clock;
    uint64_t now = clock->now != NULL ? clock->now(clock->context) : 0;
    return now > n->now ? now : n->now;
}

/* What was said before this moment is old: a node that keeps no counters begins with the time. */
static void begin_counters(mote_node_t *n, uint32_t first)
{
    uint64_t now = mote_node_now(n);
    for (uint32_t i = first; i < 1 + MOTE_GROUPS; i++) {
        if (n->counter[i].last == 0) {
            n->counter[i].last = n->counter[i].ceiling = now;
        }
    }
}

static int make_nonce(mote_node_t *n)
{
    static const uint8_t none[MOTE_NONCE];
    mote_sha256_t hash;
    uint8_t digest[32];
    int random = memcmp(n->config.nonce, none, sizeof none) != 0;
    if (n->config.keys == NULL || random) {
        memcpy(n->nonce, n->config.nonce, sizeof n->nonce);
        return 1;
    }
    mote_sha256_init(&hash);
    mote_sha256_add(&hash, "nonce", 5);
    mote_sha256_add(&hash, n->keys.command, sizeof n->keys.command);
    mote_sha256_add(&hash, &n->boots, sizeof n->boots);
    mote_sha256_end(&hash, digest);
    memcpy(n->nonce, digest, sizeof n->nonce);
    return n->config.keep.get != NULL || mote_node_now(n) != 0;
}

int mote_node_start_authority(mote_node_t *n)
{
    begin_counters(n, 0);
    return make_nonce(n) ? MOTE_OK : MOTE_ERR_ARGUMENT;
}

/* ------------------------------------------------------------------------------------------------------- seals */

static int is_set(const uint8_t key[MOTE_KEY])
{
    static const uint8_t none[MOTE_KEY];
    return memcmp(key, none, MOTE_KEY) != 0;
}

static int has_id(const uint8_t key[MOTE_KEY], const uint8_t id[8])
{
    uint8_t digest[32];
    mote_node_hash(key, MOTE_KEY, digest);
    return is_set(key) && memcmp(digest, id, 8) == 0;
}

/* The fleet's key with this id that may sign: current or next; and for new keys the root key alone. */
static const uint8_t *find_key(const mote_node_t *n, const uint8_t id[8], int root)
{
    if (root) {
        return has_id(n->keys.root, id) ? n->keys.root : NULL;
    }
    if (has_id(n->keys.current, id)) {
        return n->keys.current;
    }
    return has_id(n->keys.next, id) ? n->keys.next : NULL;
}

static int is_authentic(const mote_node_t *n, const mote_node_message_t *m, const mote_cose_t *cose, int root)
{
    if (cose->kind == MOTE_COSE_MAC0) {
        return mote_cose_check_mac0(cose, n->keys.command, m->topic, m->topic_size) == MOTE_OK;
    }
    const uint8_t *key = find_key(n, cose->key_id, root);
    return key != NULL && mote_cose_check_sign1(cose, &n->config.verify, key, m->topic, m->topic_size) == MOTE_OK;
}

/* --------------------------------------------------------------------------------------------------- freshness */

/* Whether the counter and the expiry of an authentic command could be right: UNIX times, and not far ahead. */
static int is_in_time(const mote_node_t *n, const mote_node_message_t *m, const struct command *command)
{
    uint64_t now = mote_node_now(n);
    int has_nonce = command->command_nonce_choice == command_nonce_fresh_m_c;
    if (has_nonce && memcmp(command->command_nonce_fresh_m.value, n->nonce, sizeof n->nonce) != 0) {
        return 0;
    }
    if (now == 0) {
        return has_nonce && m->source == 0 && command->command_counter < LAST_COUNTER;
    }
    return command->command_expires > now && command->command_expires - now <= AHEAD &&
           (command->command_counter <= now || command->command_counter - now <= AHEAD);
}

/* Whether this seal may carry this action. A message authentication code proves that the server or the device itself
 * made it, and only what ends with its round may depend on that. */
static int is_allowed(const mote_node_message_t *m, const mote_cose_t *cose, const struct command *command)
{
    return cose->kind == MOTE_COSE_SIGN1 ||
           (m->source == 0 && command->command_action_m.action_choice == action_train_task_m_c);
}

/* The payload of a sealed message; of one without a seal, for a node without keys, the message. */
static int open_seal(const mote_node_t *n, const mote_node_message_t *m, mote_cose_t *cose)
{
    if (n->config.keys != NULL) {
        return mote_cose_parse(m->payload, m->size, cose) == MOTE_OK;
    }
    cose->kind = MOTE_COSE_SIGN1;
    cose->payload = m->payload;
    cose->payload_size = m->size;
    return 1;
}

int mote_node_accept(mote_node_t *n, const mote_node_message_t *m, struct command *command)
{
    mote_cose_t cose;
    size_t read = 0;
    memset(&cose, 0, sizeof cose);
    if (!open_seal(n, m, &cose) ||
        cbor_decode_command(cose.payload, cose.payload_size, command, &read) != ZCBOR_SUCCESS ||
        read != cose.payload_size) {
        n->counters.malformed++;
        return 0;
    }
    /* New keys are fresh by their version alone: the root key that signs them is not at hand to sign them again. */
    int new_keys = command->command_action_m.action_choice == action_new_keys_m_c;
    mote_counter_t *counter = &n->counter[m->source];
    if (!new_keys && command->command_counter <= counter->last) {
        n->counters.stale++;
        return 0;
    }
    if (!is_allowed(m, &cose, command) || (!new_keys && !is_in_time(n, m, command)) ||
        (n->config.keys != NULL && !is_authentic(n, m, &cose, new_keys))) {
        n->counters.refused++;
        return 0;
    }
    if (!new_keys) {
        counter->last = command->command_counter;
    }
    return 1;
}

int mote_node_keep_counter(mote_node_t *n, uint32_t source)
{
    mote_counter_t *counter = &n->counter[source];
    if (counter->last <= counter->ceiling) {
        return MOTE_OK;
    }
    counter->ceiling = counter->last + STEP;
    return mote_node_keep_counters(n);
}

void mote_node_receive_time(mote_node_t *n, const mote_node_message_t *m)
{
    mote_cose_t cose;
    uint64_t now = 0;
    size_t read = 0;
    memset(&cose, 0, sizeof cose);
    if (!open_seal(n, m, &cose) ||
        cbor_decode_time_message(cose.payload, cose.payload_size, &now, &read) != ZCBOR_SUCCESS ||
        read != cose.payload_size) {
        n->counters.malformed++;
        return;
    }
    if (now <= n->now) {
        n->counters.stale++;
        return;
    }
    if (now > LAST_COUNTER || cose.kind != MOTE_COSE_SIGN1 ||
        (n->config.keys != NULL && !is_authentic(n, m, &cose, 0))) {
        n->counters.refused++;
        return;
    }
    int first = mote_node_now(n) == 0;
    n->now = now;
    if (first) {
        begin_counters(n, 1);
        n->pending |= SEND_STATUS; /* without a nonce from here on */
    }
}

/* -------------------------------------------------------------------------------------------------------- keys */

void mote_node_set_keys(mote_node_t *n, const struct new_keys *keys)
{
    mote_keys_t before = n->keys;
    if (n->config.keys == NULL) {
        mote_node_reject(n, keys->new_keys_id, ENGINE, MOTE_ERR_UNSUPPORTED);
        return;
    }
    if (keys->new_keys_version <= n->keys.version) {
        mote_node_reject(n, keys->new_keys_id, DOWNGRADE, 0);
        return;
    }
    n->keys.version = keys->new_keys_version;
    memcpy(n->keys.current, keys->new_keys_current.value, MOTE_KEY);
    memset(n->keys.next, 0, MOTE_KEY);
    if (keys->new_keys_next_choice == new_keys_next_public_key_m_c) {
        memcpy(n->keys.next, keys->new_keys_next_public_key_m.value, MOTE_KEY);
    }
    int error = mote_node_keep_keys(n);
    if (error != MOTE_OK) {
        n->keys = before;
        mote_node_reject(n, keys->new_keys_id, STORE, error);
        return;
    }
    n->pending |= SEND_STATUS;
    mote_node_reject(n, keys->new_keys_id, NO_ERROR, 0);
}
