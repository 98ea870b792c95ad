/* The errors' names. */
#include "mote.h"

const char *mote_error_name(int error)
{
    /* Of one width: a table of pointers would be filled in when the code is loaded. */
    static const char names[][24] = {
        "MOTE_OK",         "MOTE_ERR_ARGUMENT", "MOTE_ERR_FORMAT",   "MOTE_ERR_CRC",         "MOTE_ERR_ARENA",
        "MOTE_ERR_FROZEN", "MOTE_ERR_TARGET",   "MOTE_ERR_DIVERGED", "MOTE_ERR_UNSUPPORTED",
        "MOTE_ERR_AUTHENTICATION", "MOTE_ERR_STORE",
    };
    return error <= MOTE_OK && error >= MOTE_ERR_STORE ? names[-error] : "an unknown error";
}
