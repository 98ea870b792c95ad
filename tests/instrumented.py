"""A pytest plugin that puts another build of the C engine in place of the installed one: that at $MOTE_EXTENSION."""

import importlib.util
import os
import sys

import tinyfleet.edge

_spec = importlib.util.spec_from_file_location("tinyfleet.edge._mote", os.environ["MOTE_EXTENSION"])
assert _spec is not None and _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
sys.modules["tinyfleet.edge._mote"] = _module
tinyfleet.edge._mote = _module
