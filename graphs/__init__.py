"""Graphs of the examples: one file a graph, wiring only."""
