"""Decisions on the host, in numpy: how many tokens a step keeps, which ones, and the index arrays of the plan."""
