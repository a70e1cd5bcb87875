"""Graphs and their specs as JSON, which are read back without pickle and checked."""
