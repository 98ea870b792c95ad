"""The C engine and node as cffi shows them: built by mote_build.py, declared by the headers in mote/."""

from typing import Any

ffi: Any
lib: Any
