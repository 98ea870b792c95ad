"""The parts of the benchmark of the knowledge graph, which is run as `python benchmarks/graph.py`."""
