"""A pytest plugin that puts another build of the C engine in place of the installed one: that at $MOTE_EXTENSION."""

import importlib.util
import os
import sys

import edge

_spec = importlib.util.spec_from_file_location("edge._mote", os.environ["MOTE_EXTENSION"])
assert _spec is not None and _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
sys.modules["edge._mote"] = _module
edge._mote = _module
