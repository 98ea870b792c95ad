"""The C library as cffi shows it: built by mote/build_extension.py, declared by the headers in mote/include/."""

from typing import Any

ffi: Any
lib: Any
