"""What fits where: the devices that can run a model, and those that can train it."""

from ontology import library
from ontology.names import Iri
from ontology.store import Rows, Store


def clients(store: Store, model: Iri, fleet: str) -> list[str]:
    """The ids of the fleet's devices that can train the model now, in their order."""
    return [str(id) for id in store.query(library.text("clients"), model=model, fleet=fleet).column("id")]


def trainable(store: Store, model: Iri) -> Rows:
    """The devices that can train the model, those with the most room first: id, board, arena, takes, room, online."""
    return store.query(library.text("trainable"), model=model)


def runnable(store: Store, model: Iri) -> Rows:
    """The devices that can run the model, those with the most room first: id, board, arena, takes, room, online."""
    return store.query(library.text("runnable"), model=model)
