"""Fleets of microcontrollers and Raspberry Pis that keep learning after they are deployed.

The public names are those of `__all__`; each is imported when it is first used, so that `import tinyfleet` is fast and
needs no extra. Everything else in the package is private: it may change in any version, whatever its name.

=====================  ==============================================================  ========
name                   what it is                                                      extra
=====================  ==============================================================  ========
compile_model          a Keras model or .tflite file as a program for the engine       firmware, keras
plan_model, ModelPlan  the RAM and flash that a model needs to run and to train
Program                a model as the engine reads it
MoteLearner            the engine: a program that infers and learns
load_task              a learning task: its data, its model, its episodes              edge
find_broker,           the fleet's MQTT broker, from its server's data folder or its   edge
BrokerAddress          address
MqttGrid               the devices of a fleet as a Flower grid                         server
Reptile, TinyReptile,  Flower strategies for meta-learning
TinyMetaFed, FOMAML,
Asynchronous
open_graph, Graph      a fleet's knowledge graph, and the library of queries           server
Iri                    an IRI in a query's parameters and results
=====================  ==============================================================  ========
"""

from importlib import import_module
from pkgutil import extend_path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinyfleet.edge.model.learner import MoteLearner
    from tinyfleet.edge.model.program import Program
    from tinyfleet.edge.tasks import load as load_task
    from tinyfleet.edge.wire.broker_address import BrokerAddress
    from tinyfleet.edge.wire.server_info import find_broker
    from tinyfleet.firmware_tools.compiler.compile import ModelPlan, compile_model, plan_model
    from tinyfleet.ontology.graph import Graph, open_graph
    from tinyfleet.ontology.vocabulary.namespaces import Iri
    from tinyfleet.server.flower.grid import MqttGrid
    from tinyfleet.server.flower.strategies import FOMAML, Asynchronous, Reptile, TinyMetaFed, TinyReptile

    __version__: str

# In a checkout beside an installed wheel, the package is in both.
__path__ = extend_path(__path__, __name__)

__all__ = [
    "FOMAML",
    "Asynchronous",
    "BrokerAddress",
    "Graph",
    "Iri",
    "ModelPlan",
    "MoteLearner",
    "MqttGrid",
    "Program",
    "Reptile",
    "TinyMetaFed",
    "TinyReptile",
    "__version__",
    "compile_model",
    "find_broker",
    "load_task",
    "open_graph",
    "plan_model",
]

#: Name -> its module, and its name there.
_PLACES = {
    "compile_model": ("firmware_tools.compiler.compile", "compile_model"),
    "plan_model": ("firmware_tools.compiler.compile", "plan_model"),
    "ModelPlan": ("firmware_tools.compiler.compile", "ModelPlan"),
    "Program": ("edge.model.program", "Program"),
    "MoteLearner": ("edge.model.learner", "MoteLearner"),
    "load_task": ("edge.tasks", "load"),
    "BrokerAddress": ("edge.wire.broker_address", "BrokerAddress"),
    "find_broker": ("edge.wire.server_info", "find_broker"),
    "MqttGrid": ("server.flower.grid", "MqttGrid"),
    "Reptile": ("server.flower.strategies", "Reptile"),
    "TinyReptile": ("server.flower.strategies", "TinyReptile"),
    "TinyMetaFed": ("server.flower.strategies", "TinyMetaFed"),
    "FOMAML": ("server.flower.strategies", "FOMAML"),
    "Asynchronous": ("server.flower.strategies", "Asynchronous"),
    "open_graph": ("ontology.graph", "open_graph"),
    "Graph": ("ontology.graph", "Graph"),
    "Iri": ("ontology.vocabulary.namespaces", "Iri"),
}

#: Folder -> the extra that installs what its names need.
_EXTRAS = {"firmware_tools": "firmware", "ontology": "server", "server": "server"}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = import_module("importlib.metadata").version(__name__)
    elif name in _PLACES:
        module, attribute = _PLACES[name]
        try:
            value = getattr(import_module(f"{__name__}.{module}"), attribute)
        except ModuleNotFoundError as error:
            extra = _EXTRAS.get(module.split(".")[0])
            if extra is None or (error.name or __name__).split(".")[0] == __name__:
                raise
            needed = f"tinyfleet.{name} needs {error.name}, which is not installed: pip install 'tinyfleet[{extra}]'"
            raise ModuleNotFoundError(needed, name=error.name) from error
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*(name for name in globals() if name.startswith("__")), *__all__})
