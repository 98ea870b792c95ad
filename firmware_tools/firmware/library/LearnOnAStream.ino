/* Learns to tell what moves a sensor, while it runs: hold the button of a class while you show it one.
 *
 * A window of readings of A0 is a sample; the buttons from pin 2 on say its class. Without a button it says which class
 * it takes the last window for. model.h holds the program: `tinyfleet firmware export --format arduino --model` writes
 * it for yours. */
#include <mote.h>

#include "model.h"

static uint32_t arena[MODEL_ARENA_BYTES / 4]; /* all the memory that learning takes */
static model_input_t x[MODEL_INPUTS];
static mote_t engine;

void setup() {
  Serial.begin(115200);
  for (int i = 0; i < MODEL_OUTPUTS; i++) {
    pinMode(2 + i, INPUT_PULLUP);
  }
  int error = mote_load(&engine, model, sizeof model, arena, sizeof arena);
  if (error != MOTE_OK) {
    Serial.print("mote_load: ");
    Serial.println(mote_error_name(error));
    for (;;) { /* without a model there is nothing to do */
      delay(1000);
    }
  }
}

void loop() {
  for (int i = 0; i < MODEL_INPUTS; i++) {
    x[i] = sizeof(model_input_t) == 1 ? analogRead(A0) / 4 - 128 : analogRead(A0) / 512.0f - 1.0f; /* int8, or float */
    delay(10);
  }
  const int classes = (int)mote_outputs(&engine);
  for (int i = 0; i < classes; i++) {
    if (digitalRead(2 + i) == LOW) {
      float label = i, loss;
      if (mote_learn(&engine, x, &label, 0.05f, &loss) == MOTE_OK) {
        Serial.print("learned; the loss was ");
        Serial.println(loss);
      }
      return;
    }
  }
  const void *output;
  if (mote_infer(&engine, x, &output) == MOTE_OK) {
    const float *p = (const float *)output;
    int best = 0;
    for (int i = 1; i < classes; i++) {
      best = p[i] > p[best] ? i : best;
    }
    Serial.print("class ");
    Serial.println(best);
  }
}
