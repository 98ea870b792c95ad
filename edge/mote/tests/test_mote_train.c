/* A model learns a stream, with and without momentum's like; what it has learned can be saved and set again. */
#include <string.h>

#include "check.h"
#include "mote.h"

static uint32_t arena[MODEL_ARENA_BYTES / 4];

static int predicted(mote_t *m, const float *x)
{
    const void *y;
    CHECK(mote_infer(m, x, &y) == MOTE_OK);
    const float *p = y;
    int best = 0;
    for (int i = 1; i < MODEL_OUTPUTS; i++) {
        best = p[i] > p[best] ? i : best;
    }
    return best;
}

static int right_of(mote_t *m, int count)
{
    float x[MODEL_INPUTS];
    uint32_t state = 2;
    int right = 0;
    for (int i = 0; i < count; i++) {
        float label = next_of_stream(&state, x);
        right += predicted(m, x) == (int)label;
    }
    return right;
}

static void learns(float clip_norm)
{
    mote_t m;
    mote_sgd_t how = {0.05f, 0.0f, 1e-4f, clip_norm};
    float x[MODEL_INPUTS], loss;
    uint32_t state = 1;
    CHECK(mote_load(&m, model, sizeof model, arena, sizeof arena) == MOTE_OK);
    CHECK(mote_arena_bytes(model, sizeof model) == sizeof arena);
    CHECK(mote_inputs(&m) == MODEL_INPUTS && mote_outputs(&m) == MODEL_OUTPUTS && mote_targets(&m) == 1);
    for (int i = 0; i < 600; i++) {
        float label = next_of_stream(&state, x);
        int error = clip_norm > 0.0f ? mote_learn_with(&m, x, &label, &how, &loss)
                                     : mote_learn(&m, x, &label, 0.05f, &loss);
        CHECK(error == MOTE_OK && loss >= 0.0f);
    }
    CHECK(right_of(&m, 200) > 190);
}

static void what_is_learned_can_be_saved(void)
{
    mote_t m;
    static float saved[MODEL_ARENA_BYTES / 4];
    size_t count, first, size;
    CHECK(mote_load(&m, model, sizeof model, arena, sizeof arena) == MOTE_OK);
    float *parameters = mote_parameters(&m, &count);
    CHECK(mote_layer(&m, 1, &first, &size) == MOTE_OK && first + size == count);
    memcpy(saved, parameters, count * sizeof *saved);
    int before = right_of(&m, 200);
    float x[MODEL_INPUTS], loss;
    uint32_t state = 1;
    for (int i = 0; i < 100; i++) {
        float label = next_of_stream(&state, x);
        CHECK(mote_learn(&m, x, &label, 0.05f, &loss) == MOTE_OK);
    }
    CHECK(memcmp(saved, parameters, count * sizeof *saved) != 0);
    memcpy(parameters, saved, count * sizeof *saved);
    CHECK(right_of(&m, 200) == before);
}

static void only_the_layers_of_the_mask_learn(void)
{
    mote_t m;
    float x[MODEL_INPUTS], loss;
    size_t count, first, size;
    uint32_t state = 1;
    CHECK(mote_load(&m, model, sizeof model, arena, sizeof arena) == MOTE_OK);
    const float *parameters = mote_parameters(&m, &count);
    CHECK(mote_layer(&m, 1, &first, &size) == MOTE_OK);
    float frozen = parameters[0], learning = parameters[first];
    CHECK(mote_train_mask(&m, 2, 0) == MOTE_OK);
    float label = next_of_stream(&state, x);
    CHECK(mote_learn(&m, x, &label, 0.05f, &loss) == MOTE_OK);
    CHECK(parameters[0] == frozen && parameters[first] != learning);
    CHECK(mote_train_mask(&m, 4, 0) == MOTE_ERR_FROZEN);
}

int main(void)
{
    learns(0.0f);
    learns(1.0f);
    what_is_learned_can_be_saved();
    only_the_layers_of_the_mask_learn();
    return 0;
}
