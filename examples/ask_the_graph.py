"""A SPARQL question from Python: which boards have a microphone and the RAM for a model?

    python examples/ask_the_graph.py

fills a graph with the boards that firmware is built for and two devices, and prints

    ...
"""
