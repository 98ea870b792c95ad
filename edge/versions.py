"""The versions on which a device and a server must agree."""

WIRE_VERSION = 3
"""Of the messages in wire/protocol.cddl: another one would misunderstand them."""
PROGRAM_FORMAT = 2
"""Of the programs that the engine reads: MOTE_FORMAT_VERSION of its headers."""
ENGINE_VERSION = "0.2.0"
"""Of the engine: MOTE_VERSION in mote.h."""
