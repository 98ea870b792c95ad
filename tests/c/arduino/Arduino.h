/* As much of Arduino's interface as the example sketch uses, so that it compiles without it. */
#ifndef ARDUINO_H
#define ARDUINO_H

#include <stdint.h>

enum { INPUT_PULLUP = 2, LOW = 0, A0 = 14 };

struct Printer {
    void begin(unsigned long baud);
    void print(const char *text);
    void print(int value);
    void println(const char *text);
    void println(int value);
    void println(double value);
};

extern Printer Serial;

void pinMode(int pin, int mode);
int digitalRead(int pin);
int analogRead(int pin);
void delay(unsigned long milliseconds);

#endif
