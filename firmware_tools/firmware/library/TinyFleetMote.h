/* The engine, for sketches. */
#include "mote.h"
