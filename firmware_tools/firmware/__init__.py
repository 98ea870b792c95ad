"""Firmware for a board, from the engine's C to an ELF file."""

MODEL_SLOT_BYTES = 4096
"""RAM for a model sent over the air, unless the caller says otherwise."""
