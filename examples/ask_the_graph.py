"""A SPARQL question from Python: which known boards could train this model, and how much RAM is left?

    python examples/ask_the_graph.py

describes a model and the boards that firmware is built for in a graph in memory, asks, and prints

    microbit: 7,128 B left
    mps3-an547: 515,032 B left
    ...
"""

from tinyfleet import load_task
from tinyfleet.firmware_tools.boards.catalogue import board_ids, load_board
from tinyfleet.ontology.ingest import describe
from tinyfleet.ontology.store.store import EmbeddedStore

QUESTION = """
PREFIX tf: <https://w3id.org/tinyfleet#>
SELECT ?board (?ram - ?needed AS ?left) WHERE {
  ?model a tf:Model ; tf:trainRamBytes ?needed ; tf:storageBytes ?program .
  ?hardware a tf:Board ; tf:boardId ?board ; tf:ramBytes ?ram ; tf:flashBytes ?flash .
  FILTER(?ram >= ?needed && ?flash >= ?program)
}
ORDER BY ?left ?board
"""


def main() -> None:
    with EmbeddedStore() as store:
        describe.put_model(store, describe.from_program(load_task("digits").program, "keywords"))
        for name in board_ids():
            describe.put_board(store, load_board(name).board)
        for row in store.query(QUESTION):
            print(f"{row['board']}: {row['left']:,} B left")


if __name__ == "__main__":
    main()
