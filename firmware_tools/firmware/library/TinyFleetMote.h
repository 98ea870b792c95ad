/* mote.h for C++, and so for sketches. */
#ifndef TINYFLEET_MOTE_H
#define TINYFLEET_MOTE_H

extern "C" {
#include "mote.h"
}

#endif
