"""Sampling: solvers and guidance, and the steps that they call."""
