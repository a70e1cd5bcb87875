"""Graphs and what belongs to them as JSON, read back without pickle and checked."""
