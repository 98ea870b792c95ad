"""A SPARQL question from Python: which boards could train a model, and which of them are in the fleet?

    python examples/ask_the_graph.py

describes the known boards, a model and one device in a graph, asks a question of its own and one of the library, and
prints

    ...
"""
