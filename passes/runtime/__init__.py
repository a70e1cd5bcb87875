"""A converted model in torch: calls, runs and their steps, and sets of weights."""
