/* What opening sealed messages costs: a COSE_Mac0 as the "inference", a COSE_Sign1 as the "step". */
#include "bench.h"
#include "device.h"
#include "mote_cose.h"

static const char topic[] = "tinyfleet/home/devices/one/command";

int bench_start(void)
{
    return 1;
}

void bench_sample(uint32_t i)
{
    (void)i;
}

int bench_infer(void)
{
    mote_cose_t message;
    int error = mote_cose_parse(device_mac0, DEVICE_MAC0_BYTES, &message);
    return error != MOTE_OK ? error : mote_cose_check_mac0(&message, device_command_key, topic, sizeof topic - 1);
}

int bench_learn(void)
{
    static const mote_verify_t verify = {NULL, mote_ed25519_verify};
    mote_cose_t message;
    int error = mote_cose_parse(device_sign1, DEVICE_SIGN1_BYTES, &message);
    return error != MOTE_OK ? error
                            : mote_cose_check_sign1(&message, &verify, device_fleet_key, topic, sizeof topic - 1);
}
