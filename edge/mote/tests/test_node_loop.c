/* The loop around a node: it announces itself, subscribes, drops invalid messages, and has nothing to do then. */
#include <string.h>

#include "check.h"
#include "mote_node.h"

static uint32_t arena[MODEL_ARENA_BYTES / 4];
static float sample[MODEL_INPUTS + MODEL_OUTPUTS];
static uint8_t out[MOTE_OUT];
static uint32_t state;

static int open_stream(void *context, uint32_t seed)
{
    (void)context;
    state = seed;
    return MOTE_OK;
}

static int next_sample(void *context, int query, float *x, float *y)
{
    (void)context;
    (void)query;
    *y = next_of_stream(&state, x);
    return 1;
}

static mote_node_config_t configured(void)
{
    mote_node_config_t config;
    memset(&config, 0, sizeof config);
    config.fleet = "home";
    config.id = "sensor-1";
    config.td = "{}";
    config.td_size = 2;
    config.program = model;
    config.program_size = sizeof model;
    config.arena = arena;
    config.arena_size = sizeof arena;
    config.sample = sample;
    config.sample_count = sizeof sample / sizeof *sample;
    config.out = out;
    config.out_size = sizeof out;
    config.source.open = open_stream;
    config.source.next = next_sample;
    return config;
}

/* Takes all that the node has to send: how many messages of each kind. */
static void drain(mote_node_t *n, int *published, int *subscribed)
{
    mote_out_t message;
    *published = *subscribed = 0;
    while (mote_node_poll(n, &message)) {
        CHECK(strstr(message.topic, "home") != NULL);
        *published += message.kind == MOTE_PUBLISH || message.kind == MOTE_PUBLISH_RETAINED;
        *subscribed += message.kind == MOTE_SUBSCRIBE;
        CHECK(*published + *subscribed < 100);
    }
}

static void a_node_greets_and_then_waits(void)
{
    static mote_node_t n;
    const mote_node_config_t config = configured();
    int published, subscribed;
    mote_out_t will;
    CHECK(mote_node_init(&n, &config) == MOTE_OK);
    mote_node_will(&n, &will);
    CHECK(strstr(will.topic, "sensor-1") != NULL && will.size > 0);
    for (int session = 0; session < 2; session++) {
        mote_node_connected(&n);
        drain(&n, &published, &subscribed);
        CHECK(published >= 2 && subscribed >= 1); /* its Thing Description and its status; its commands */
        CHECK(!mote_node_step(&n));
        drain(&n, &published, &subscribed);
        CHECK(published == 0 && subscribed == 0);
    }
}

static void what_is_no_message_is_counted_and_dropped(void)
{
    static mote_node_t n;
    const mote_node_config_t config = configured();
    int published, subscribed;
    mote_out_t message;
    char command[MOTE_TOPIC] = "";
    CHECK(mote_node_init(&n, &config) == MOTE_OK);
    mote_node_connected(&n);
    while (mote_node_poll(&n, &message)) {
        if (message.kind == MOTE_SUBSCRIBE && strstr(message.topic, "sensor-1") != NULL) {
            strcpy(command, message.topic);
        }
    }
    CHECK(command[0] != '\0');
    mote_node_receive(&n, command, strlen(command), (const uint8_t *)"garbage", 7);
    mote_node_receive(&n, command, strlen(command), NULL, 0); /* a retained message that is gone */
    mote_node_receive(&n, "elsewhere", 9, (const uint8_t *)"garbage", 7);
    CHECK(n.counters.malformed >= 1);
    CHECK(!mote_node_step(&n));
    drain(&n, &published, &subscribed);
    CHECK(published == 0 && subscribed == 0 && n.counters.samples == 0);
}

static void a_wrong_configuration_is_an_error(void)
{
    static mote_node_t n;
    mote_node_config_t config = configured();
    config.id = "no spaces, please";
    CHECK(mote_node_init(&n, &config) == MOTE_ERR_ARGUMENT);
    config = configured();
    config.sample_count--;
    config.sample_count -= MODEL_OUTPUTS;
    CHECK(mote_node_init(&n, &config) == MOTE_ERR_ARGUMENT);
    config = configured();
    config.arena_size -= 4;
    CHECK(mote_node_init(&n, &config) == MOTE_ERR_ARENA);
}

int main(void)
{
    a_node_greets_and_then_waits();
    what_is_no_message_is_counted_and_dropped();
    a_wrong_configuration_is_an_error();
    return 0;
}
